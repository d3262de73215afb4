"""A Slurm of one machine for tests: `sbatch`, `srun`, `squeue`, `scancel`, `scontrol` as scripts on PATH.

`install(folder)` writes the scripts; jobs run in the background, one array element after the other, honouring
`--dependency=afterok:…`. Beside the scripts lie `<id>.sh` (the script of job id), `<id>.args` (sbatch's arguments),
`<id>.rc` (0 if all elements ended well; it is there when the job is gone) and `<id>.cancelled`. A file `broken` there
makes jobs die without running anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

SBATCH = """#!{python}
import json, os, pathlib, re, shutil, subprocess, sys, time
state = pathlib.Path(__file__).parent
if sys.argv[1] == "--run-in-background":
    job, array, dependency = sys.argv[2], int(sys.argv[3]), sys.argv[4]
    result = 0
    while dependency and not (state / f"{{dependency}}.rc").exists():
        time.sleep(0.05)
    if (state / "broken").exists() or (dependency and (state / f"{{dependency}}.rc").read_text() != "0"):
        result = 1
    else:
        for element in range(array + 1):
            if (state / f"{{job}}.cancelled").exists():
                result = 1
                break
            env = os.environ | {{"SLURM_ARRAY_TASK_ID": str(element), "SLURM_JOB_ID": job, "SLURM_NODELIST": "here",
                               "RUN_OFFSET": "0"}}
            with open(state / f"{{job}}_{{element}}.out", "w") as log:
                result |= subprocess.run(["bash", state / f"{{job}}.sh"], env=env, stdout=log, stderr=log).returncode
    (state / f"{{job}}.rc").write_text(str(int(bool(result))))
    sys.exit()
job = str(101 + len(list(state.glob("*.sh"))))
script = shutil.copy(sys.argv[-1], state / f"{{job}}.sh")
(state / f"{{job}}.args").write_text(json.dumps(sys.argv[1:-1]))
array = re.search(r"--array=0-(\\d+)", pathlib.Path(script).read_text())[1]
dependency = re.search(r"afterok:(\\d+)", " ".join(sys.argv[1:]))
subprocess.Popen([sys.executable, __file__, "--run-in-background", job, array, dependency[1] if dependency else ""],
                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job", job)
"""
SRUN = """#!{python}
import os, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments = arguments[2:] if arguments[0] == "-n" else arguments[1:]
os.execvp(arguments[0], arguments)
"""
SQUEUE = """#!{python}
import pathlib, sys
state = pathlib.Path(__file__).parent
for job in sys.argv[sys.argv.index("-j") + 1].split(","):
    if (state / f"{{job}}.sh").exists() and not (state / f"{{job}}.rc").exists():
        print(job)
"""
SCANCEL = """#!{python}
import pathlib, sys
for job in sys.argv[1:]:
    (pathlib.Path(__file__).parent / f"{{job}}.cancelled").touch()
"""
SCONTROL = """#!{python}
print("here")
"""


def install(folder: Path) -> None:
    """Write the scripts to `folder`, which the caller puts in front of PATH."""
    folder.mkdir()
    for name, source in (
        ("sbatch", SBATCH),
        ("srun", SRUN),
        ("squeue", SQUEUE),
        ("scancel", SCANCEL),
        ("scontrol", SCONTROL),
    ):
        path = folder / name
        path.write_text(source.format(python=sys.executable))
        path.chmod(0o755)
