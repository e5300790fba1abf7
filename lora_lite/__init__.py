"""lora-lite: hackable PyTorch adapters, attached by plain forward hooks."""

from importlib.metadata import PackageNotFoundError, version

from . import variants as variants
from .attaching import attach, detach
from .attachment import Attachment, param_groups, parameters, state_dict
from .calibration import InputPCA, MeanAbsProjection, Statistic
from .checkpoint import load, load_state_dict, save
from .config import AdapterConfig
from .diagnosis import Diagnosis, LayerDiagnosis, diagnose
from .errors import (
    AttachError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    KernelMismatchError,
    LoraLiteError,
)
from .interchange import export_diffusers, export_peft, import_diffusers, import_peft
from .left_out import LeftOut
from .merging import merged_state_dict, save_merged
from .params import Params, ParamSpec
from .primitives import (
    InputLowRankAdd,
    LowRankAdd,
    LowRankAddRescale,
    Primitive,
    RotatePairs,
    ScaleInput,
    ScaleOutput,
)
from .selection import disabled, unchanged, use
from .variant import REGISTRY, Variant, register
from .variants.antipasto import AntiPaSTOConfig
from .variants.delora import DeLoRAConfig
from .variants.dora import DoRAConfig
from .variants.eva import EVAConfig
from .variants.hra import HRAConfig
from .variants.ia3 import IA3Config, IA3FFConfig
from .variants.lora import LoRAConfig
from .variants.pissa import PiSSAConfig
from .variants.road import RoadConfig
from .verification import Comparison, verify

try:
    __version__ = version("lora-lite")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "REGISTRY",
    "AdapterConfig",
    "AntiPaSTOConfig",
    "AttachError",
    "Attachment",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DeLoRAConfig",
    "Diagnosis",
    "DoRAConfig",
    "EVAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "InputLowRankAdd",
    "InputPCA",
    "KernelMismatchError",
    "LayerDiagnosis",
    "LeftOut",
    "LoRAConfig",
    "LoraLiteError",
    "LowRankAdd",
    "LowRankAddRescale",
    "MeanAbsProjection",
    "ParamSpec",
    "Params",
    "PiSSAConfig",
    "Primitive",
    "RoadConfig",
    "RotatePairs",
    "ScaleInput",
    "ScaleOutput",
    "Statistic",
    "Variant",
    "attach",
    "detach",
    "diagnose",
    "disabled",
    "export_diffusers",
    "export_peft",
    "import_diffusers",
    "import_peft",
    "load",
    "load_state_dict",
    "merged_state_dict",
    "param_groups",
    "parameters",
    "register",
    "save",
    "save_merged",
    "state_dict",
    "unchanged",
    "use",
    "verify",
]
