"""Exports of a removal on the Hugging Face Hub: one repository, one commit.

Its root is the export that every tool loads from the repository's name: the stock model if there is one. The model
without norms is then the subfolder ``norm-free``.
"""

from __future__ import annotations

from math import isnan
from pathlib import Path

import pandas as pd
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported under a condition

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError, RunFailedError
from normfree.locks import locked
from normfree.progress import stage
from normfree.removal.layout import NORM_FREE, NORM_FREE_FOLDER, REMOVAL_FOLDER, TABLE_FILE
from normfree.removal.model_card import CARD_FILE, TAGS, base_model, exports, model_card
from normfree.sources import is_offline, split_revision
from normfree.training.run_config import load_run_config
from normfree.training.run_folder import CONFIG_FILE

SECONDS_TO_ANSWER = 20.0
LATER = "correct that, or leave --push-to-hub out and give the command with it later"
OWN_FILES = (".gitattributes", CARD_FILE)
"""Files of a repository that holds no model yet."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Endings of files that a later push replaces: transformers loads ``model.safetensors`` before newer shards."""


def check_repository(repository: str, *, private: bool = False) -> None:
    """Checks that a removal can be pushed to ``repository``, before it trains. Changes nothing on the Hub.

    Args:
        repository: OWNER/NAME; created by the push if it does not exist.
        private: whether it has to be private.

    Raises:
        InputError: the name has another form, there is no token or one that cannot write there, the Hub cannot be
            reached, or the repository exists and is public but has to be private, or holds a model that is not
            Normfree's.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository: {_reason(error)}; write OWNER/NAME") from error
    if "/" not in repository:
        raise InputError(f"the repository {repository!r} has no owner; write OWNER/NAME, such as YOU/{repository}")
    if get_token() is None:
        raise InputError("there is no token to push to the Hub with; run `hf auth login`, or set HF_TOKEN")
    if is_offline():
        raise InputError(
            f"the Hub ({constants.ENDPOINT}) cannot be reached: HF_HUB_OFFLINE is set, or there is no network; {LATER}"
        )
    try:
        _check_existing(repository, private)
        _check_owner(repository)
    except InputError:
        raise
    except Exception as error:  # of the client, of its HTTP library, of the operating system
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise InputError(
                "the Hub does not know the token; run `hf auth login`, or set HF_TOKEN to a token that can write"
            ) from error
        raise InputError(
            f"the Hub ({constants.ENDPOINT}) does not accept a push to {repository}: {_reason(error)}; {LATER}"
        ) from error


def push_to_hub(folder: Path, repository: str, *, private: bool = False) -> str:
    """Pushes the exports of the finished removal in ``folder`` to a repository of the Hub, in one commit.

    Weights of a former push are replaced, other files stay. A failed push can be repeated.

    Args:
        folder: of a removal, with ``removal.csv``.
        repository: OWNER/NAME; created if it does not exist.
        private: whether it has to be private; False leaves that to the Hub's settings.

    Returns:
        The repository's address.

    Raises:
        InputError: see :func:`check_repository`; or ``folder`` holds no finished removal.
        RunFailedError: the push failed; ``folder`` is as before.
    """
    folder = Path(folder)
    _check_finished(folder)
    check_repository(repository, private=private)
    with locked(folder), stage(f"pushing to {repository}"):
        try:
            _fetch_card_of_base(folder)
            api = HfApi()
            address = api.create_repo(repository, private=True if private else None, exist_ok=True)
            additions = _additions(folder, repository)
            new = {each.path_in_repo for each in additions}
            stale = [each for each in api.list_repo_files(repository) if _is_weight(each) and each not in new]
            api.create_commit(
                repository,
                operations=[*additions, *(CommitOperationDelete(path_in_repo=each) for each in stale)],
                commit_message="Model without norms, by Normfree",
            )
        except Exception as error:  # of the client, of its HTTP library, of hf_xet, of the operating system
            raise RunFailedError(
                f"the push to {repository} failed: {_reason(error)}; the exports in {folder} are whole, and the same "
                "command pushes them again"
            ) from error
    return str(address)


def _check_existing(repository: str, private: bool) -> None:
    try:
        info = HfApi().model_info(repository, timeout=SECONDS_TO_ANSWER)
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise InputError(
            f"{repository} exists and is public; name another repository, make it private on the Hub, or leave "
            "--private out"
        )
    files = {each.rfilename for each in info.siblings or ()}
    if files - {*OWN_FILES} and TAGS[0] not in (info.tags or ()):
        raise InputError(
            f"{repository} holds something else (its card has no tag {TAGS[0]!r}); name another repository"
        )


def _check_owner(repository: str) -> None:
    """Checks the token of the Hub; a fine-grained one does not say all that it may do."""
    who = HfApi().whoami()
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(f"the token of {who['name']} can only read; give one that can write to {repository}")
    owners = [who["name"], *(each["name"] for each in who.get("orgs", ()))]
    if role == "write" and repository.partition("/")[0].lower() not in {each.lower() for each in owners}:
        raise InputError(
            f"the token of {who['name']} cannot write to {repository}; owners that it can write for: "
            f"{', '.join(owners)}"
        )


def _check_finished(folder: Path) -> None:
    path = folder / TABLE_FILE
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"variant": [], EVAL_LOSS: []})
    losses = table.loc[table["variant"] == NORM_FREE, EVAL_LOSS]
    if not exports(folder) or losses.empty or isnan(losses.iloc[0]):
        raise InputError(f"{folder} holds no finished removal ({TABLE_FILE} and the folder {NORM_FREE_FOLDER})")


def _fetch_card_of_base(folder: Path) -> None:
    """Brings the base model's card, which states its licence, into the Hub's cache, if the Hub has it."""
    start = load_run_config(folder / REMOVAL_FOLDER / CONFIG_FILE).start_from
    base = base_model(start) if start is not None else None
    if base is None or base.hub_id is None or base.license:
        return
    try:
        hf_hub_download(base.hub_id, CARD_FILE, revision=split_revision(base.name)[1])
    except (OSError, ValueError):  # no card, or no access to it: the licence stays unknown
        return


def _additions(folder: Path, repository: str) -> list[CommitOperationAdd]:
    root = exports(folder)[0]
    additions = []
    for export in exports(folder):
        place = "" if export == root else f"{export}/"
        card = model_card(folder, export, repository).encode("utf-8")
        additions.append(CommitOperationAdd(f"{place}{CARD_FILE}", card))
        for path in sorted((folder / export).rglob("*")):
            name = path.relative_to(folder / export).as_posix()
            if path.is_file() and name != CARD_FILE:
                additions.append(CommitOperationAdd(f"{place}{name}", str(path)))
    return additions


def _is_weight(name: str) -> bool:
    """True for weights at the places of exports; others in the repository are its owner's."""
    return name.endswith(WEIGHTS) and name.removeprefix(f"{NORM_FREE_FOLDER}/").count("/") == 0


def _reason(error: Exception) -> str:
    """The first line of an error's message, or what the server said."""
    text = getattr(error, "server_message", None) or str(error)
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), type(error).__name__)
