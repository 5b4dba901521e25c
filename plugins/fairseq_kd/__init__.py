"""lskd's plugin for fairseq: `--user-dir plugins/fairseq_kd --criterion ls_kd`.

Importing it registers the criterion `ls_kd` and the tasks `translation_ls_kd` and `translation_multi_ls_kd`,
lets torch's safe loader read fairseq's checkpoints, guards what is built of them and what data-bins contain,
and watches fairseq's trainer.
"""

from fairseq_kd import errors, safe_loading, sound_data, watched_trainer

errors.install()
safe_loading.install()
sound_data.install()
watched_trainer.install()

from fairseq_kd import criterion, multilingual, task  # noqa: E402 - they are registered when all else is in place

__all__ = ["criterion", "multilingual", "task"]
