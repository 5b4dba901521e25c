"""YAML files of defaults, as timm's scripts read them and as every run writes one (args.yaml)."""

import argparse
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_yaml

# Set by a launched run, or about the run rather than the recipe: args.yaml of a run may hold them.
_IGNORED = frozenset({"data", "config", "distributed", "world_size", "rank", "local_rank", "prefetcher"})


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from argument names to values.

    Raises:
        LskdError: missing file, not YAML, or not a mapping with words as keys.
    """
    content = read_yaml(path, "config file")
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise LskdError(f"config file {path} must map argument names to values, such as 'lr: 0.1'.")
    return content


def settings_beside(checkpoint: Path, model: str) -> dict[str, Any]:
    """Read the args.yaml that timm's trainers leave beside a checkpoint; {} when it is not this model's."""
    try:
        content = read_config(checkpoint.parent / "args.yaml")
    except LskdError:
        return {}
    return content if _architecture(content.get("model")) == _architecture(model) else {}


def _architecture(name: object) -> str:
    return str(name).partition(".")[0]


def apply_config(parser: argparse.ArgumentParser, config: dict[str, Any], path: str) -> list[str]:
    """Make the values of `config` the parser's defaults.

    Returns:
        Warnings, one line each: keys that the trainer does not know.

    Raises:
        LskdError: a value of the wrong type, or an upstream-only argument that is switched on.
    """
    actions = {action.dest: action for action in parser._actions}
    unknown = []
    defaults = {}
    for key, value in config.items():
        if key in actions and key not in ("help", "config"):
            if value is not None:  # null: as if the key were not there
                defaults[key] = converted(actions[key], value, path)
        elif key in UPSTREAM_ONLY:
            if value not in (UPSTREAM_ONLY[key], None):
                raise LskdError(
                    f"{path} sets {key}, an argument of timm's upstream train.py only; "
                    "remove it or pass that script's path: timm /path/to/train.py ..."
                )
        elif key not in _IGNORED:
            unknown.append(key)
    parser.set_defaults(**defaults)
    if not unknown:
        return []
    return [f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(sorted(unknown))} ignored"]


def converted(action: argparse.Action, value: Any, path: str) -> Any:
    """Bring a YAML value to what the same text on the command line would have given.

    Raises:
        LskdError: a value of the wrong type, or none of the argument's choices.
    """

    def refuse(expected: str) -> LskdError:
        return LskdError(f"{path}: {action.dest} must be {expected}, got {value!r}.")

    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if isinstance(action.default, dict):
        if not isinstance(value, dict):
            raise refuse("a mapping")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise refuse("a list" if not isinstance(action.nargs, int) else f"a list of {action.nargs}")
        return [_scalar(action, item, refuse) for item in value]
    return _scalar(action, value, refuse)


def _scalar(action: argparse.Action, value: Any, refuse: Any) -> Any:
    wanted: Any = action.type or str
    if (
        value is None
        or isinstance(value, bool | list | dict)
        or (wanted is int and isinstance(value, float) and value % 1)
    ):
        raise refuse({int: "a whole number", float: "a number"}.get(wanted, "text"))
    try:
        # YAML 1.1 reads 1e-4 as text; float() takes it as the number that was meant.
        result = wanted(value) if not isinstance(value, float) or wanted is not int else int(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse({int: "a whole number", float: "a number"}.get(wanted, "text")) from None
    if action.choices is not None and result not in action.choices:
        raise refuse("one of " + ", ".join(repr(choice) for choice in action.choices))
    return result


UPSTREAM_ONLY: dict[str, Any] = {
    "train_num_samples": None,
    "val_num_samples": None,
    "dataset_download": False,
    "input_img_mode": None,
    "input_key": None,
    "target_key": None,
    "dataset_trust_remote_code": False,
    "pretrained_path": None,
    "gp": None,
    "fuser": "",
    "fast_norm": False,
    "head_init_scale": None,
    "head_init_bias": None,
    "torchscript": False,
    "model_dtype": None,
    "synchronize_step": False,
    "local_rank": 0,
    "device_modules": None,
    "layer_decay": None,
    "layer_decay_min_scale": 0,
    "layer_decay_no_opt_scale": None,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "lr_cycle_mul": 1.0,
    "lr_cycle_decay": 0.5,
    "lr_cycle_limit": 1,
    "lr_k_decay": 1.0,
    "epoch_repeats": 0.0,
    "patience_epochs": 10,
    "color_jitter_prob": None,
    "grayscale_prob": None,
    "gaussian_blur_prob": None,
    "aug_repeats": 0,
    "aug_splits": 0,
    "jsd_loss": False,
    "bce_sum": False,
    "bce_target_thresh": None,
    "bce_pos_weight": None,
    "resplit": False,
    "cutmix_minmax": None,
    "drop_connect": None,
    "drop_block": None,
    "bn_eps": None,
    "split_bn": False,
    "worker_seeding": "all",
    "recovery_interval": 0,
    "save_images": False,
    "tta": 0,
    "use_multi_epochs_loader": False,
    "log_wandb": False,
    "wandb_project": None,
    "wandb_tags": [],
    "wandb_resume_id": "",
    "train_img_sizes": None,
    "train_batch_sizes": None,
    "train_size_probs": None,
    "train_size_schedule": "constant",
    "train_size_schedule_spread": 0.65,
    "train_size_random_mix": 0.1,
    "train_batches_per_epoch": None,
    "train_steps_per_epoch": None,
    "variable_batch_loss_scale": "none",
    "naflex_loader": False,
    "naflex_train_seq_lens": [128, 256, 576, 784, 1024],
    "naflex_max_seq_len": 576,
    "naflex_patch_sizes": None,
    "naflex_patch_size_probs": None,
    "naflex_loss_scale": "linear",
    "naflex_patchify_channels_first": False,
    "kd_model_name": None,
    "kd_distill_type": "logit",
    "kd_loss_type": "kl",
    "distill_loss_weight": None,
    "task_loss_weight": None,
    "kd_student_feature_dim": None,
    "kd_teacher_feature_dim": None,
    "kd_token_distill_type": "soft",
}
