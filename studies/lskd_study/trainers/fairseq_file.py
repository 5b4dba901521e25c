"""A file for fairseq-hydra-train, checked with fairseq's own settings before anything is trained."""

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lskd import LskdError
from lskd_study.base.text import did_you_mean


def check_settings(content: Mapping[str, Any], path: str) -> None:
    """Check names and types of all settings; `${...}` is looked up within its own section only.

    Raises:
        LskdError: one line that names the file and the setting.
    """
    known = {field.name: field for field in fields(FairseqConfig) if not field.name.startswith("_")}
    for section, given in content.items():
        if section == "hydra":
            continue
        if section not in known:
            raise LskdError(f"{path}: unknown section {section!r}; {_near(section, [*known, 'hydra'])}")
        default = known[section].default
        kind = default if isinstance(default, type) else _named(section, given, path)
        if kind is None or not isinstance(given, Mapping):
            continue
        if section == "model" and issubclass(kind, TransformerConfig):
            # Its names are nested, or flat as on the command line (encoder_embed_dim).
            given = {name: value for name, value in given.items() if name not in _flat_names()}
        try:
            OmegaConf.merge(OmegaConf.structured(kind()), given)
        except ConfigKeyError as error:
            near = _near(str(error.full_key).rpartition(".")[2], map(str, error.parent_node or ()))
            raise LskdError(f"{path}: unknown setting {section}.{error.full_key}; {near}") from None
        except OmegaConfBaseException as error:
            name = f"{section}.{error.full_key}"
            raise LskdError(f"{path}: {name}: {str(error).splitlines()[0]}; fix it") from None


def _named(section: str, given: Any, path: str) -> Any:
    """Return the settings of the component that a section chooses by `_name`; None for nothing chosen."""
    name = given.get("_name") if isinstance(given, Mapping) else given
    if name is None:
        if given:
            raise LskdError(f"{path}: {section} has no _name; add which one it is")
        return None
    if section == "task":
        registry = TASK_DATACLASS_REGISTRY
    elif section == "model":
        registry = dict.fromkeys(ARCH_MODEL_REGISTRY)  # None: fairseq has no dataclass of its settings
        kinds = ARCH_MODEL_REGISTRY.items()
        transformers = [arch for arch, kind in kinds if issubclass(kind, TransformerModelBase)]
        registry |= dict.fromkeys(transformers, TransformerConfig) | MODEL_DATACLASS_REGISTRY
    else:
        registry = REGISTRIES[section]["dataclass_registry"] if section in REGISTRIES else {}
    if not isinstance(name, str) or name not in registry:
        raise LskdError(f"{path}: {section}._name is {name!r}; {_near(str(name), registry)}")
    return registry[name]


def _flat_names() -> set[str]:
    parser = ArgumentParser()
    gen_parser_from_dataclass(parser, TransformerConfig(), delete_default=True, with_prefix="")
    return {action.dest for action in parser._actions}


def _near(name: str, valid: Iterable[str]) -> str:
    return did_you_mean(name, valid, "see fairseq-train --help")
