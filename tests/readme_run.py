"""README from top to bottom, by copy and paste, in a clone of the last commit in an empty folder.

Run: make test-readme    (15 minutes on 2 idle cores; it installs, so it needs a package index)

Every line is the README's. What a machine without GPUs and without the 8B model cannot have is
replaced by the table below, and each `train` line gets the flags that make it small.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = "runs/demo-quick"

STAND_INS = {
    "meta.json": f"{RUN}/meta.json",
    "/data": f"$PWD/{RUN}/readme_data",
    "/models/": f"$PWD/{RUN}/models/",
    "--model-size internvl3_5-8b": "--model-size toy",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
SMALL = (
    "--model-size toy --seq-length 512 --global-batch-size 2 --train-iters 2 --lr-warmup-iters 1"
    " --num-workers 1"
)
META = {
    "demo": {
        "root": f"{RUN}/data",
        "annotation": f"{RUN}/data/train.jsonl",
        "repeat_time": 1,
        "length": 2000,
        "data_augment": False,
    }
}
# In the place of what a user brings: the released model, and data in the official form.
BROUGHT = f"""
vico convert --from megatron --to hf --layout internvl --input {RUN}/pretrain \\
    --output {RUN}/models/InternVL3_5-8B --tokenizer-model {RUN}/tokenizer/demo.model
"""


def small(block: str) -> str:
    """The commands of a block, with their stand-ins."""
    lines = block.replace("\\\n", " ").splitlines()
    for index, line in enumerate(lines):
        command, hash_sign, comment = line.partition("  #")
        for given, instead in STAND_INS.items():
            command = command.replace(given, instead)
        lines[index] = f"{command}{f' {SMALL}' if ' train ' in command else ''}{hash_sign}{comment}"
    return "\n".join(lines)


def test_every_block_runs_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "megatron_vico"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    blocks = FENCE.findall((clone / "README.md").read_text())
    shell = [block for language, block in blocks if language == "bash"]
    (python,) = [block for language, block in blocks if language == "python"]
    (clone / "README.python").write_text(python.replace('"/models/', f'"{clone}/{RUN}/models/'))
    words = [
        "set -eE; trap 'echo \"README: failed: $BASH_COMMAND\"' ERR",
        shell[0],
        BROUGHT,
        f"cat > {RUN}/meta.json <<'META'\n{json.dumps(META)}\nMETA",
        *map(small, shell[1:]),
        f"cp {RUN}/page.png . && python README.python",
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(words)],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout[-8000:])
    assert done.returncode == 0
    assert (clone / RUN / "models" / "8b-flash" / "config.json").exists()
    shutil.rmtree(clone / ".venv")
