"""The table of readers, with what their inputs are made of and how many there are in the long form."""

from fuzz import attacks, of_commands, of_numbers, of_publishers, of_studies, of_texts
from fuzz.harness import Target
from fuzz.of_commands import words
from fuzz.of_numbers import logits
from fuzz.of_studies import epochs
from fuzz.of_texts import recipe_texts, trainer_file
from fuzz.values import in_csv, in_json

YAML = [
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!",
    b"? ",
    b"- ",
    b": ",
    b"{",
    b"[",
    b"\n",
    b"  ",
    b"'",
    b'"',
    b"#",
    b"|\n",
    b"~",
]
JSON = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"1e999", b"NaN", b"\\ud800", b"-", b"true"]
NAMES = [name.encode() for name in attacks.NAMES]


JSON_TREE, YAML_TREE = in_json(), in_json()
STUDENT, TEACHER = "ls_kd", "label_smoothed_cross_entropy"
MMCLS_EPOCHS = b"epoch,train_ce,val_top1,val_loss\n1,0.5,70.1,0.3\n2,0.4,71.0,0.2\n"
TIMM_EPOCHS = (
    b"epoch,train_loss,train_ce,eval_loss,eval_top1,eval_top5\n0,0.5,0.4,0.3,70.1,99\n1,0.4,0.3,0.2,71,99\n"
)
TARGETS = [
    Target("study file", of_texts.study_file, 15_000, YAML_TREE, YAML + NAMES, short=8),
    Target("study file to plan", of_texts.study_plan, 10_000, YAML_TREE, YAML + NAMES, short=8),
    Target("list of teachers", of_texts.teacher_list, 8_000, YAML_TREE, YAML + NAMES, short=8),
    Target("recipe", of_texts.recipe, 6_000, YAML_TREE, YAML + NAMES, short=8),
    Target("YAML itself", of_texts.yaml_bounds, 40_000, None, YAML),
    Target(
        "trainer's file: timm",
        trainer_file(
            "timm", "student", "test_resnet", recipe_texts("digits/student.yaml", "imagenet/student.yaml")
        ),
        *(10_000, YAML_TREE, YAML),
    ),
    Target(
        "trainer's own file: timm",
        *(of_commands.timm_file, 4_000, YAML_TREE, YAML),
    ),
    Target(
        "trainer's file: fairseq",
        trainer_file("fairseq", "student", "transformer", recipe_texts("ding_de_en/student.yaml")),
        *(4_000, YAML_TREE, [*YAML, b"${common.seed}", b"${oc.env:HOME}"]),
    ),
    Target("trainer's settings: mmcls", of_texts.mmcls_settings, 20_000, JSON_TREE, JSON),
    Target("soft labels: manifest", of_numbers.manifest, 60_000, in_json(of_numbers.checksum_again), JSON),
    Target("soft labels: rows, index, checksums", of_numbers.blocks, 60_000),
    Target(
        "soft labels: URL",
        of_numbers.urls,
        20_000,
        None,
        [b"://", b"@", b"::", b"..", b"%00", b"memory://", b"\n"],
    ),
    Target(
        "logits: npz",
        logits(".npz"),
        40_000,
        None,
        [b"PK\3\4", b"PK\1\2", b"PK\5\6", b"\x93NUMPY", b"'|O'", b"'<U9'"],
    ),
    Target("logits: safetensors", logits(".safetensors"), 60_000, None, [*JSON, b'"F64"', b"I64", b"BOOL"]),
    Target(
        "logits: parquet", logits(".parquet"), 20_000, None, [b"PAR1", b"\x15", b"\x1c", b"\xff" * 9 + b"\1"]
    ),
    Target("run: logits, curves, job", of_studies.run_folder, 30_000, None, JSON),
    Target(
        "run: curves.csv",
        of_studies.curves,
        60_000,
        in_csv,
        [b'"', b",", b"\n", b"\r", b"nan", b"1e999", b"\0"],
    ),
    Target("run: translations.jsonl", of_studies.translations, 60_000, None, JSON),
    Target("run: job.json, begun.json", of_studies.job_file, 60_000, JSON_TREE, JSON),
    Target(
        "run: summary.csv to go on from", of_studies.resumed_summary, 40_000, in_csv, [b'"', b"\n", b"\0"]
    ),
    Target("log: timm", epochs("timm", "summary.csv", TIMM_EPOCHS), 40_000, in_csv, [b'"', b",", b"\n"]),
    Target(
        "log: fairseq",
        epochs("fairseq", "hydra_train.log", of_studies.FAIRSEQ_LOG),
        40_000,
        None,
        [*JSON, b'"nan"', b"[valid]"],
    ),
    Target("log: mmcls", epochs("mmcls", "epochs.csv", MMCLS_EPOCHS), 40_000, in_csv, [b'"', b",", b"\n"]),
    Target("study: plan.json", of_studies.plan_file, 8_000, JSON_TREE, JSON),
    Target("study: verdicts.json", of_studies.verdicts, 15_000, JSON_TREE, JSON + NAMES),
    Target("study: page of verdicts", of_studies.index_page, 2_000, JSON_TREE, JSON + NAMES, short=8),
    Target("table of results", of_studies.results_table, 60_000, in_csv, [b'"', b",", b"\n", *NAMES]),
    Target("data: manifest", of_publishers.data_manifest, 60_000, JSON_TREE, JSON),
    Target(
        "data: table of labels",
        of_publishers.label_table,
        40_000,
        in_csv,
        [b"../", b"/", b"\0", b'"', *NAMES],
    ),
    Target(
        "data: archive",
        of_publishers.tar_archive,
        60_000,
        None,
        [b"ustar", b"\0" * 512, b"../", b"GNU.sparse.map=0,1", b"L", b"x"],
    ),
    *of_publishers.PUBLISHERS,
    Target("data: Fashion-MNIST", of_publishers.fashion, 10_000),
    Target(
        "images",
        of_publishers.images,
        10_000,
        None,
        [b"IHDR", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"\xff\xc0", b"\xff\xda"],
    ),
    Target(
        "checkpoint: weights",
        of_numbers.weights,
        20_000,
        None,
        [b"cos\nsystem\n", b"\x93", b"R", b"b", b"\x81", b"(", b"t", b"\x8b"],
    ),
    Target("checkpoint: fairseq", of_numbers.fairseq_checkpoint, 5_000),
    Target("checkpoint: mmcls", of_numbers.mmcls_checkpoint, 10_000),
    Target("checkpoint: packed student", of_numbers.packed_student, 5_000, None, JSON),
    Target("command: lskd", of_commands.lskd_command, 5_000, words, warm=False, short=8),
    Target("command: timm", of_commands.timm_command, 6_000, words, warm=False),
    Target("command: plugins", of_commands.plugin_command, 2_000, words, warm=False, short=8),
]
