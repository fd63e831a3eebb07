"""What detectors measure, by name: the ``measure`` of an ``Evidence``. How each is shown is in ``lustral.report.words``."""

MASK_AREA = "mask_area"  # pixels of mask that send other classes to a label; infinite when no search succeeded
CHANGE_ENERGY = "change_energy"  # least mean ||x' - x||^2 / C of a change that sends other classes to a label, pixels
LATENT_NORM = (
    "latent_norm"  # least change of the last features that sends most images to a label; over the median label's
)
SUCCESS_RATE = (
    "success_rate"  # of that trigger on held-out images of other classes that are not called the label anyway
)
NATURAL_RATE = (
    "natural_rate"  # fraction of held-out images of other classes that are called the label without any trigger
)
ANOMALY_INDEX = "anomaly_index"  # how far below the other labels log(area) lies, in their robust standard deviations
ENTROPY = "entropy"  # of the recovered distribution: mean pairwise distance of stamped samples, pixels of full contrast
REFERENCE_RANK = (
    "reference_rank"  # -log10 of the least p-value of a scan, ranked among those of benign reference models
)
SEARCH_STEPS = "search_steps"  # that a label received before screening dropped it
