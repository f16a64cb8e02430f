"""Names on the Hub: what is one, and what is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from robustfeat.errors import HubError
from robustfeat.hub.remote import HubAccess, is_commit, is_hub_name, is_revision

NAMES = ["org/name", "o/n", "Org-1/name_v1.0", "org/name-", "-org/name", "org/na--me", "org/na..me", "org/.name"]
NAMES += ["org/name.git", "org/" + "x" * 96, "org/" + "x" * 97, "org/n\n", "org/n m", "o/\u00e9"]


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_client_takes_the_names_that_we_take(name: str) -> None:
    try:
        validate_repo_id(name)
        taken = name.isascii()  # the client's rules let other letters pass, the Hub's do not
    except HFValidationError:
        taken = False
    assert is_hub_name(name) == taken


@pytest.mark.parametrize("name", ["name", "a/b/c", "/a/b", "./a/b", "a/", "/b", ""])
def test_what_is_not_two_names_is_none(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("name", ["main", "v1.0", "feature/x", "refs/pr/1", "a" * 40, "v1+cpu", "50%"])
def test_revisions(name: str) -> None:
    assert is_revision(name)
    assert is_commit(name) == (name == "a" * 40)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "v1/..", "x y", "x\ny", "-x", "/x", "x/", "a:b", "a\\b", "a\0b"]
)
def test_what_cannot_be_a_revision(name: str) -> None:
    assert not is_revision(name)


@pytest.mark.parametrize(
    ("kind", "said", "what", "fix"),
    [
        (
            RevisionNotFoundError,
            "",
            "org/name: has no revision 'x'; it has main, v1",
            "check the branch, tag or commit (a commit has 40 digits)",
        ),
        (HfHubHTTPError, "no; never", "org/name: http://hub.test refuses (no; never)", None),
    ],
)
def test_a_fix_is_none_of_the_problem(
    monkeypatch: pytest.MonkeyPatch, kind: type[HfHubHTTPError], said: str, what: str, fix: str | None
) -> None:
    refs = SimpleNamespace(branches=[SimpleNamespace(name="main")], tags=[SimpleNamespace(name="v1")])
    monkeypatch.setattr(HubAccess, "api", lambda _: SimpleNamespace(list_repo_refs=lambda *_, **__: refs))
    response: Any = SimpleNamespace(status_code=418, headers={}, request=None)
    hub = HubAccess(endpoint="http://hub.test", token=False)
    with pytest.raises(HubError) as info, hub.explaining("org/name", "x"):
        raise kind(said, response=response)
    assert (info.value.what, info.value.fix) == (what, fix)
