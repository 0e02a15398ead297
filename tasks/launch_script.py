"""The script of a job, as text: what runs in the run folder's snapshot, alone or as several ranks.

Knows accelerate's command line and the template; does not start anything.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2

from llada_core.config.launch import LaunchParams, SlurmParams
from llada_core.config.params import TRAINING_STAGES, Params
from llada_core.settings import DEVICE_SETTING, ConfigError
from llada_core.training.params import GRPOParams, TrainingParams
from tasks.folders import hash_of, write_text
from tasks.record.runs import RunFolder

TEMPLATE = Path(__file__).with_name("job.sh.jinja")
OWN_ACCELERATE = "accelerate.yaml"  # launch.accelerate_config, as it was when the job was submitted
# What a job sees of the submitter's environment, beside what the cluster gives it.
PASSED_ON = (
    "PATH", "VIRTUAL_ENV", "LLADAFLOW_DATA_ROOT", "HF_HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", DEVICE_SETTING,
)  # fmt: skip


def render(run: RunFolder, launch: LaunchParams, *, slurm: bool) -> str:
    """The whole script of one job."""
    options = launch.slurm if slurm else SlurmParams()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run.path,
        slurm=slurm,
        sbatch=sbatch_options(run, options) if slurm else [],
        setup=[*(f"module load {name}" for name in options.modules), *options.setup],
        env=_environment(run, launch, slurm=slurm),
        command=_command(run, launch, slurm=slurm),
        restarts=launch.restarts,
    )


def write_job(run: RunFolder, launch: LaunchParams, *, slurm: bool) -> Path:
    """Put the script, and a person's own accelerate file, into the run folder: later edits reach no waiting job."""
    if launch.accelerate_config:
        own = run.root / Path(launch.accelerate_config).expanduser()
        if not own.is_file():
            raise ConfigError(
                f"launch.accelerate_config: there is no {own}; give a path from the project's folder, or a whole one"
            )
        write_text(run.path / OWN_ACCELERATE, own.read_text(encoding="utf-8"))
    write_text(run.path / "job.sh", render(run, launch, slurm=slurm))
    return run.path / "job.sh"


def job_name(run: RunFolder) -> str:
    """The name that finds a run's job again: its key, and which folder of that name it is."""
    return f"{run.key}-{hash_of(str(run.path))[:6]}"


def sbatch_options(run: RunFolder, slurm: SlurmParams) -> list[str]:
    """The `#SBATCH` lines. One name and `singleton`: two jobs of one run never run at once."""
    values = {
        "job-name": job_name(run),
        "dependency": "singleton",
        "output": _as_option(run.log),
        "open-mode": "append",
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "mem": slurm.memory,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "signal": f"B:USR1@{slurm.signal_seconds}" if slurm.time else None,
    }
    return ["--requeue", *(f"--{key}={value}" for key, value in values.items() if value is not None), *slurm.extra]


def _as_option(path: Path) -> str:
    """A path for `#SBATCH`: Slurm fills in what follows a `%`, and a space or `#` outside of quotes ends an option."""
    text = str(path).replace("%", "%%")
    plain = re.fullmatch(r"[\w/.@+,=:~%-]+", text)
    return text if plain else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _environment(run: RunFolder, launch: LaunchParams, *, slurm: bool) -> dict[str, str]:
    passed = {} if slurm else {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    places = [str(run.tree), str(run.root)]
    if any(":" in place for place in places):  # which ends an entry; the script starts in the first of them
        places = [os.path.relpath(place, run.tree) for place in places]
    own = {"LLADAFLOW_RUN": str(run.path), "PYTHONUNBUFFERED": "1", "PYTHONPATH": ":".join(places)}
    # Several processes of one thread each are faster than one of several threads: a small model's products are small.
    single = {"OMP_NUM_THREADS": "1"} if launch.cpu_processes > 1 and not gpus_of(launch, slurm=slurm) else {}
    threads = {"OMP_NUM_THREADS": str(launch.threads)} if launch.threads else {}
    return single | passed | own | threads | launch.env


def _command(run: RunFolder, launch: LaunchParams, *, slurm: bool) -> str:
    kind, _, item = run.stage.partition("@")
    program = f"-m tasks.{kind}" + (f" {shlex.quote(item)}" if item else "")
    python = shlex.quote(sys.executable)
    nodes = launch.slurm.nodes if slurm else 1
    training = Params.parse(run.request["all_params"], run.key).training(kind) if kind in TRAINING_STAGES else None
    count = ranks_per_node(training, launch, slurm=slurm)
    if kind == "evaluate" and nodes > 1 and launch.processes is None:
        count = max(1, launch.slurm.gpus_per_node)  # on one node evaluate starts one process a GPU itself
    processes = nodes * count
    config = _accelerate_config(run, launch, training)
    if processes == 1 and config is None:  # a kind that was asked for by name gets its process group even alone
        command = f"{python} {program}"
        return f"srun --kill-on-bad-exit=1 {_srun(launch)}{command}" if slurm else command
    kinds = f"--config_file {shlex.quote(str(config))}" if config else "--multi_gpu"
    ranks = f"{kinds} --num_processes {processes} --num_machines {nodes}"
    accelerate = f"{python} -m accelerate.commands.launch {ranks} --mixed_precision no --dynamo_backend no"
    if not slurm:
        return f"{accelerate} --main_process_port 0 {program}"
    per_node = f'{accelerate} --machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port "$1" {program}'
    return f'srun --kill-on-bad-exit=1 {_srun(launch)}bash -c {shlex.quote("exec " + per_node)} "$address" "$port"'


def machine_settings(params: Params, stage: str, launch: LaunchParams) -> dict[str, Any]:
    """What a training stage's settings are where its job will run, whatever the machine that submits it has."""
    if stage not in TRAINING_STAGES:
        return {}
    slurm = launch.kind == "slurm"
    otherwise = launch.gpu is not None or any("gpu" in option for option in launch.slurm.extra)
    gpu = gpus_of(launch, slurm=slurm) > 0 or (slurm and otherwise)
    return {"precision": params.settled(stage, gpu=gpu).precision}


def ranks_per_node(training: TrainingParams | None, launch: LaunchParams, *, slurm: bool) -> int:
    """`launch.processes`, or for a training stage as many of the visible GPUs as its rows of a step divide over.

    Without a GPU `launch.cpu_processes` stands in for their number.
    """
    if launch.processes is not None or training is None:
        return launch.processes or 1
    nodes = launch.slurm.nodes if slurm else 1
    most = gpus_of(launch, slurm=slurm) or launch.cpu_processes
    rows = training.prompts if isinstance(training, GRPOParams) else training.batch_size
    return max((n for n in range(1, most + 1) if rows % (n * nodes) == 0), default=1)


def gpus_of(launch: LaunchParams, *, slurm: bool) -> int:
    """GPUs of each node that a job will see."""
    return launch.slurm.gpus_per_node if slurm else visible_gpus()


def visible_gpus() -> int:
    """As CUDA would count them, without the seconds that importing torch takes."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    if chosen is None:
        return devices
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return min(devices, next((n for n, name in enumerate(names) if name == "-1"), len(names)))  # CUDA stops at -1


def _accelerate_config(run: RunFolder, launch: LaunchParams, training: TrainingParams | None) -> Path | None:
    """A file of the run folder: the snapshot's for the kind of distribution, or the copy of a person's own."""
    if launch.accelerate_config:
        return run.path / OWN_ACCELERATE
    kind = training.distribution.kind if training is not None else "auto"
    return None if kind in ("auto", "none") else run.tree / "tasks" / "accelerate" / f"{kind}.yaml"


def _srun(launch: LaunchParams) -> str:
    return "".join(f"{shlex.quote(option)} " for option in launch.slurm.srun_options)
