"""What ``--help`` says about commands, jobs and flags. It does not import JAX, which takes a second or two."""

from __future__ import annotations

import textwrap

from crate_jax import config_files
from crate_jax.errors import end_output, print_error

# The jobs of crate_jax.jobs.JOBS, whose import brings JAX.
JOBS = {
    "pretrain": "train an encoder without labels",
    "evaluate": "judge an encoder by k-NN, a probe or few labels",
    "finetune": "fine-tune an encoder on labels",
    "segment": "learn a class for every pixel on an encoder",
    "sweep": "run one pre-training per value and seed, for a table and a figure",
    "align": "tell which corruption can teach something about given labels, before any training",
    "report": "write one page about one run or several",
}
# The other jobs have a config of their own name, so that --config may be left out.
CONFIG_NEEDED = {"pretrain": "cifar10:encoder=crate", "finetune": "evaluate:protocol=finetune_crate"}
OTHERS = {
    "convert": "read and write weights of other libraries: inspect, import, export",
    "configs": "list the configs that --config takes by name",
}
EXAMPLES = {
    "pretrain": "--config=quickstart:method=vibcreg --workdir=runs/first",
    "evaluate": "--config.checkpoint=runs/first --config.data.source=folder:IMAGES --workdir=runs/scores",
    "finetune": "--config=evaluate:protocol=finetune_crate --config.checkpoint=runs/first"
    " --config.data.source=folder:IMAGES --workdir=runs/tuned",
    "segment": "--config.checkpoint=runs/first --config.data.source=folder:PAIRS --workdir=runs/classes",
    "sweep": "--config=sweep:over=lam,base=quickstart --workdir=runs/sweep",
    "align": "--config.checkpoint=runs/first --config.data.source=folder:IMAGES --workdir=runs/align",
    "report": "--config.checkpoint=runs/first",
}
# Flag -> what it is for; crate_jax.flags defines them, and --config, by the same texts.
FLAGS = {
    "job": "The job that the config must have; crate-jax JOB sets it.",
    "workdir": "The run's folder: checkpoints, metrics, pictures, summary.",
    "coordinator_address": "For several processes: HOST:PORT of process 0.",
    "num_processes": "For several processes: their number.",
    "process_id": "For several processes: this one's number, from 0.",
    "cluster_detection_method": "For several processes: how JAX finds them, such as mpi4py.",
}


def wanted(args: list[str]) -> bool:
    """Whether the arguments of a command ask for its help."""
    return bool({"-h", "-help", "--help"} & set(args))


def tell(text: str) -> int:
    """Prints an answer; returns the exit status, which is 2 if nobody can read it."""
    try:
        print(text)
        end_output()
    except OSError as e:
        print_error(f"the output cannot be written ({e.strerror})")
        return 2
    return 0


def commands() -> str:
    """The commands of ``crate-jax``, one a line."""
    return "\n".join(
        [
            "usage: crate-jax COMMAND [--config=NAME_OR_FILE[:key=value,...]] [--workdir=DIR] [--config.KEY=VALUE ...]",
            "",
            *_rows(JOBS | OTHERS),
            "",
            "crate-jax COMMAND --help says more. The same command in the same workdir continues what was stopped.",
        ]
    )


def job(name: str) -> str:
    """The help of one job: what it does, the configs that fit it, the flags."""
    config = "--config=NAME[:words]" if name in CONFIG_NEEDED else "[--config=NAME[:words]]"
    workdir = "[--workdir=DIR]" if name == "report" else "--workdir=DIR"
    fitting = [config for config in config_files.names() if name in config_files.jobs(config)]
    default = "" if name in CONFIG_NEEDED else f" (default: {name})"
    return "\n".join(
        [
            f"usage: crate-jax {name} {config} [--config.KEY=VALUE ...] {workdir}",
            "",
            _sentence(JOBS[name]),
            "The same command in the same workdir continues what was stopped.",
            f"Example: crate-jax {name} {EXAMPLES[name]}",
            "",
            f"Configs for it{default}; --config also takes the path of a file of yours:",
            *_rows({config: config_files.card(config) for config in fitting}),
            "",
            *_flags([flag for flag in FLAGS if flag != "job"]),
        ]
    )


def main() -> str:
    """The help of ``python -m crate_jax.main``, which runs any job."""
    return "\n".join(
        [
            "usage: python -m crate_jax.main --config=NAME[:words] [--config.KEY=VALUE ...] --workdir=DIR",
            "",
            "Runs the job of the config. crate-jax JOB does the same, and crate-jax JOB --help says more about a job:",
            *_rows(JOBS),
            "",
            "Configs; --config also takes the path of a file of yours:",
            *_rows({name: config_files.card(name) for name in config_files.names()}),
            "",
            *_flags(list(FLAGS)),
        ]
    )


def configs() -> str:
    """The help of ``crate-jax configs``."""
    return f"usage: crate-jax configs\n\n{_sentence(OTHERS['configs'])}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _flags(names: list[str]) -> list[str]:
    rows = {
        "config": "A config's name or file. After a colon: its words, such as key=value,key=value.",
        "config.KEY": "One key of the config, such as --config.optimizer.lr=1e-3.",
        **{name: FLAGS[name] for name in names},
        "helpfull": "The flags of all libraries, too.",
    }
    return [
        "Flags:",
        *_rows({f"--{name}": text for name, text in rows.items()}),
        "",
        "docs/config.md lists all keys. The words of a config are at the top of its file, in",
        str(config_files.folder()),
    ]


def _rows(texts: dict[str, str]) -> list[str]:
    width = max(map(len, texts)) + 2
    return [
        line
        for name, text in texts.items()
        for line in textwrap.wrap(
            text, 110, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (width + 2), break_on_hyphens=False
        )
    ]
