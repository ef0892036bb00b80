"""Analyses of trained transformers (linear probe, CKNNA, CKA), comparison of encoders, and pictures of both."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.analysis.blocks import cknna_of_run as cknna_of_run
    from repa.analysis.blocks import depth_effects as depth_effects
    from repa.analysis.blocks import principal_colours as principal_colours
    from repa.analysis.encoders import compare_encoders as compare_encoders
    from repa.analysis.hidden import collect_hidden as collect_hidden
    from repa.analysis.measures import cka as cka
    from repa.analysis.measures import cknna as cknna
    from repa.analysis.measures import cknna_of as cknna_of
    from repa.analysis.measures import correlation_decay_slope as correlation_decay_slope
    from repa.analysis.measures import local_distance_similarity as local_distance_similarity
    from repa.analysis.measures import neighbourhoods as neighbourhoods
    from repa.analysis.measures import rms_spatial_contrast as rms_spatial_contrast
    from repa.analysis.neighbours import find_copies as find_copies
    from repa.analysis.neighbours import nearest_images as nearest_images
    from repa.analysis.probes import linear_probes as linear_probes
    from repa.analysis.probes import probe_of_encoder as probe_of_encoder
    from repa.analysis.probes import probe_of_run as probe_of_run
else:
    __getattr__, __dir__, __all__ = exports(__name__)
