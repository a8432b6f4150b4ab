"""Images and labels: read a data set, split it, preprocess it, keep the result on disk."""

from qsearch.data.dataset import Dataset, Part, Progress, load_dataset
from qsearch.data.decode import decode
from qsearch.data.preprocessing import Interpolation, Preprocessing, read_preprocessing

__all__ = ["Dataset", "Interpolation", "Part", "Preprocessing", "Progress", "decode", "load_dataset", "read_preprocessing"]
