"""Settings of the libraries that hold for a whole process."""

import os
import warnings

import torch
from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Hide progress bars and warnings of libraries that a user of Relay cannot act on."""
    datasets_logging.disable_progress_bar()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # Relay names the line of a file that it cannot read
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # trl and peft still use names that transformers has renamed, and torch names that it has renamed itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch\.distributed")


def limit_kernel_cache() -> None:
    """Let oneDNN keep at most 128 compiled kernels; in bf16 on a CPU it compiles one for each shape of a product.

    Its default of 1024 takes hundreds of megabytes, because texts have new lengths in every batch. A PPO update uses
    about 80 of them again and again. oneDNN reads the variable at the first product; a value of the user stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def choose_attention_kernels() -> None:
    """Leave cuDNN's attention out: it plans each new shape on the host, and texts have new lengths in every batch.

    torch prefers it on an H100 to its own kernels, which need no plan.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
