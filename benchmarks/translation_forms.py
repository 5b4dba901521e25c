"""What is lost of a teacher's words: students of a fairseq recipe from each form of them, on the test set.

python benchmarks/translation_forms.py recipes/ding_de_en --output runs/ding_forms    # after its teacher
python benchmarks/translation_forms.py recipes/ding_de_en --forms plain,all --set optimization.max_epoch=6

All forms of K words have K = 8. A run that was cut goes on, and one that is finished is measured again;
--set gives overrides of fairseq's, of all runs. Prints, and writes forms.csv: BLEU of tokenised text
(beam 5), perplexity and expected calibration error in percent, both by subword of the references.
"""

import argparse
import csv
import logging
import math
import subprocess
import sys
from pathlib import Path

import sacrebleu
import torch
import yaml
from torch.nn.functional import cross_entropy

import fairseq_kd
from fairseq_kd import passes
from fairseq_kd.teacher import Teacher
from lskd.analysis.calibration import calibration_contributions, confidence_and_correct

FORMS = {
    "plain": ["++criterion.kd_weight=0"],
    "renormalise": ["++criterion.kd_top_k=8", "++criterion.kd_rest=renormalise"],
    "spread": ["++criterion.kd_top_k=8", "++criterion.kd_rest=spread"],
    "lump": ["++criterion.kd_top_k=8", "++criterion.kd_rest=lump"],
    "sampled": ["++criterion.kd_sampled=8"],
    "all": [],
}
COLUMNS = ("form", "bleu", "perplexity", "calibration_error_percent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path, help="folder with student.yaml, whose teacher is trained")
    parser.add_argument("--output", type=Path, default=Path("runs/translation_forms"))
    parser.add_argument("--forms", default=",".join(FORMS), help="default: all of them")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fairseq's overrides")
    args = parser.parse_args()
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    task = yaml.safe_load((args.recipe / "student.yaml").read_text(encoding="utf-8"))["task"]
    given = dict(one.lstrip("+").split("=", 1) for one in args.set)
    data = given.get("task.data", task["data"])
    rows = []
    for form in args.forms.split(","):
        save = args.output / form
        train(args.recipe, save, [*FORMS[form], *args.set])
        rows.append((form, *measured(save, data)))
        print(*rows[-1], sep="\t", flush=True)
    with (args.output / "forms.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def train(recipe: Path, save: Path, overrides: list[str]) -> None:
    """Train one student, or go on; what fairseq says goes into a file beside it."""
    save.mkdir(parents=True, exist_ok=True)
    begun, told = save / "overrides.txt", "\n".join(overrides)
    if begun.exists() and begun.read_text(encoding="utf-8") != told:
        sys.exit(f"{save} was trained with other overrides ({begun}); give another --output")
    begun.write_text(told, encoding="utf-8")
    command = [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(recipe.resolve())]
    command += ["--config-name", "student", f"checkpoint.save_dir='{save.resolve()}'"]
    command += [f"common.user_dir='{Path(fairseq_kd.__file__).parent}'", *overrides]
    with (save / "train.log").open("a", encoding="utf-8") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            sys.exit(f"training failed; {save}/train.log says why")


def measured(save: Path, data: str) -> tuple[float, float, float]:
    """Return BLEU, perplexity and calibration error in percent, of the test set."""
    model = Teacher([save], data, None, None)
    words = model.task.target_dictionary
    asked = passes.Pass(model, "test", 4096, teaches=False)
    search = argparse.Namespace(beam=5, max_len_a=1.2, max_len_b=10)
    generator = model.task.build_generator(model.models, search)
    said, references, nll, sure = [], [], [], []
    for window in passes.windows(asked.pairs, bar=False):
        for index, tokens in asked.translated(window, generator).items():
            said.append(words.string(tokens, "@@ "))
            references.append(words.string(asked.pairs[index]["target"], "@@ "))
        for batch in asked.batches(window):
            counts = batch["target"].ne(words.pad())
            target = batch["target"][counts].cpu()
            logits = model.logits(batch["net_input"])[counts].float().cpu()
            nll.append(cross_entropy(logits, target, reduction="none"))
            sure.append(confidence_and_correct(logits, target))
    bleu = sacrebleu.corpus_bleu(said, [references], tokenize="none", force=True).score
    error = calibration_contributions(*map(torch.cat, zip(*sure, strict=True))).mean()
    perplexity = math.exp(torch.cat(nll).double().mean())
    return round(bleu, 2), round(perplexity, 3), round(100 * float(error), 2)


if __name__ == "__main__":
    main()
