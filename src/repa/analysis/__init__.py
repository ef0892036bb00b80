"""Layer 3: what a trained transformer knows (linear probe, CKNNA, CKA), how encoders differ, and pictures of both."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "cka": "similarity",
        "cknna": "similarity",
        "cknna_of": "similarity",
        "neighbourhoods": "similarity",
        "cknna_of_run": "of_run",
        "collect_hidden": "hidden",
        "compare_encoders": "encoders",
        "depth_effects": "depth",
        "correlation_decay_slope": "spatial",
        "find_copies": "neighbours",
        "linear_probe": "probe",
        "linear_probes": "probe",
        "local_distance_similarity": "spatial",
        "nearest_images": "neighbours",
        "principal_colours": "pictures",
        "probe_of_encoder": "probing",
        "probe_of_run": "probing",
        "rms_spatial_contrast": "spatial",
    },
)
