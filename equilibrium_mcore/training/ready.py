"""What a start needs beside its settings, asked without building a model: `--check`.

A start asks the same functions on its way: `check_start` and `build_run_datasets` in `setup`,
`look_at_run_folder` in its folder, `refuse_local_ranks` in `launch`. So what is accepted here
starts; what only the built model or the running job can show is in docs/guides/TRAINING_GUIDE.md.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from equilibrium_mcore.checkpoint.choose import find_alone, find_weights
from equilibrium_mcore.checkpoint.compatibility import check_resumable, check_same_model
from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint, inspect
from equilibrium_mcore.config.chat import ConversationsConfig
from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.judges import HttpJudgeConfig, reward_models
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.config.stages import STAGES
from equilibrium_mcore.data.indexed_files import dataset_paths
from equilibrium_mcore.optim.frozen import check_optimizer_state
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.launch import rank_info_from_environment, refuse_local_ranks
from equilibrium_mcore.parallel.rendezvous import meeting_place
from equilibrium_mcore.training.ready_roles import check_roles, models_beside
from equilibrium_mcore.training.run_data import (
    Progress,
    build_run_datasets,
    cached_conversations,
    check_run_data,
    left_out_of,
    with_steps,
)
from equilibrium_mcore.training.run_folder import look_at_run_folder
from equilibrium_mcore.verification.http_judge import headers_of

Say = Callable[[str], object]


def check_ready(config: RunConfig, *, elsewhere: bool = False, say: Say = print) -> None:
    """Raise ConfigError with everything that would keep `config` from starting; nothing is written.

    The rules of the settings were asked before (`config.rules`). With `elsewhere` the run is for
    another host: files that are not on this one are said and left out, and so is the folder.
    """
    problems: list[str] = []
    absent = _absent(config) if elsewhere else []
    if absent:
        say(f"not on this host, and not checked: {', '.join(map(str, absent))}")
    if not elsewhere:
        _collect(problems, lambda: _check_host(config))
        _collect(problems, lambda: look_at_run_folder(config))
        if isinstance(config.judge, HttpJudgeConfig):
            _collect(problems, lambda: headers_of(config.judge))
    progress: Progress | None = None
    if config.checkpoint.initial_weights not in absent:
        progress = _collect(problems, lambda: _find_start(config))
    _collect(problems, lambda: check_adapters(config))
    _collect(problems, lambda: check_policy(config))
    roles = check_roles(config, absent=absent, ask=partial(_collect, problems), say=say)
    if len(roles) > 1:
        say(_memory(config, roles))
    if config.training.frozen or config.optimizer.overrides or config.adapters is not None:
        _collect(problems, lambda: _check_patterns(config))
    if not {*_data_files(config)} & {*absent}:
        _collect(problems, lambda: _check_data(config, progress))
    if problems:
        raise ConfigError(problems)


def check_start(
    config: RunConfig, *, checkpoint: OpenedCheckpoint | None, weights: OpenedCheckpoint | None
) -> None:
    """Raise ConfigError unless `config` may continue `checkpoint`, or start from `weights`."""
    if checkpoint is not None:
        where = str(checkpoint.path)
        check_resumable(checkpoint.config, config, checkpoint=where)
        check_optimizer_state(checkpoint.config, config, checkpoint=where)
    elif weights is not None:
        check_same_model(weights.config, config, checkpoint=str(weights.path))


def check_adapters(config: RunConfig) -> None:
    """Raise ConfigError for adapters beside weights that nothing was trained on."""
    if config.adapters is not None and config.checkpoint.initial_weights is None:
        raise ConfigError(
            "adapters without checkpoint.initial_weights: the frozen weights beside them would be "
            "random; name a run's output directory or one of its checkpoints"
        )


def check_policy(config: RunConfig) -> None:
    """Raise ConfigError for a policy whose stage asks for no answers to learn from."""
    if isinstance(config.objective, PolicyConfig) and STAGES[config.stage].data != "prompts":
        asked = {name: stage.defaults.get("objective", {}) for name, stage in STAGES.items()}
        fit = [name for name, objective in asked.items() if objective.get("type") == "policy"]
        raise ConfigError(
            f"objective.type='policy' with stage={config.stage!r}: a policy learns from its own "
            f"answers to prompts; set stage to {' or '.join(fit)}"
        )


# --------------------------------------------------------------------------------- the inside


def _collect[T](problems: list[str], ask: Callable[[], T]) -> T | None:
    """What `ask` returns; the problems of its ConfigError join the others."""
    try:
        return ask()
    except ConfigError as error:
        where = f"{error.source}: " if error.source else ""
        problems += [where + problem for problem in error.problems]
        return None


def _check_host(config: RunConfig) -> None:
    """Launcher variables, and ranks that this host would have to start by itself."""
    if rank_info_from_environment(os.environ) is None:
        refuse_local_ranks(config.parallelism)
    else:
        meeting_place(os.environ)


def _find_start(config: RunConfig) -> Progress | None:
    """`state.json` of the checkpoint that would be resumed. Raises ConfigError.

    Its small files are hashed; `resume --check` verifies every byte.
    """
    found = find_alone(config, verify=False)
    if found is not None:
        check_start(config, checkpoint=found.opened, weights=None)
        left_out_of(config, found.opened.facts)
        return found.opened.facts
    if config.checkpoint.initial_weights is not None:
        path = find_weights(config.checkpoint.initial_weights)
        check_start(config, checkpoint=None, weights=inspect(path, needs_state=False))
    return None


def _memory(config: RunConfig, roles: dict[str, ModelConfig]) -> str:
    """What each model takes of a rank. Models are built without memory."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.planning.memory import memory_of_roles

    return memory_of_roles(config, roles)


def _check_patterns(config: RunConfig) -> None:
    """Names of parameters: the model is built without memory."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.adapters.report import with_adapters
    from equilibrium_mcore.optim.param_groups import parameter_rows

    with_adapters(parameter_rows(config), config)


def _check_data(config: RunConfig, progress: Progress | None) -> None:
    with _not_kept(config) as kept:
        kept = with_steps(kept)
        if isinstance(kept.data, DataConfig) and kept.data.order == "megatron":
            check_run_data(kept)  # its order is a file, which a check does not write
        else:
            build_run_datasets(kept, progress)


@contextmanager
def _not_kept(config: RunConfig) -> Iterator[RunConfig]:
    """The run, whose encoded conversations are forgotten unless there is a folder for them."""
    cached = isinstance(config.data, ConversationsConfig)
    if not cached or cached_conversations(config).cache_directory.is_dir():
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="conversations_") as folder:
        data = config.data.model_copy(update={"cache_directory": Path(folder)})
        yield config.model_copy(update={"data": data})


def _data_files(config: RunConfig) -> Iterator[Path]:
    yield config.data.tokenizer.model
    for source in config.data.sources:
        if isinstance(config.data, DataConfig):
            yield from dataset_paths(source.prefix)[:2]
        else:
            yield from (*source.train, *source.validation)


def _absent(config: RunConfig) -> list[Path]:
    """What the run reads and this host does not have."""
    objective = config.objective
    more = [config.checkpoint.initial_weights, *(path for _, path in reward_models(config))]
    more += [getattr(objective, "targets", None), *models_beside(config).values()]
    files = [*_data_files(config), *{path for path in more if path is not None}]
    return [path for path in files if not path.exists()]
