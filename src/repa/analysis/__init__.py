"""Layer 3: what a trained transformer knows (linear probe, CKNNA, CKA) and how an encoder's features lie in space."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "cka": "similarity",
        "cknna": "similarity",
        "cknna_of_run": "of_run",
        "collect_hidden": "hidden",
        "correlation_decay_slope": "spatial",
        "linear_probe": "probe",
        "probe_of_run": "of_run",
        "local_distance_similarity": "spatial",
        "rms_spatial_contrast": "spatial",
    },
)
