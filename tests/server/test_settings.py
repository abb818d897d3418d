"""Where a setting comes from: flag, variable, file, default, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import SetupError
from server.settings import Settings, load


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"TRINITY_{name.upper()}", raising=False)


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nslots = 2\nwaiting = 3\nallowed_hosts = ["a.example", "b.example"]\nopenai_key = "secret"\n')
    monkeypatch.setenv("TRINITY_PORT", "11")
    monkeypatch.setenv("TRINITY_SLOTS", "12")
    chosen = load(["--config", str(file), "--port", "21"])
    assert (chosen.port, chosen.slots, chosen.waiting, chosen.host) == (21, 12, 3, "127.0.0.1")
    assert chosen.allowed_hosts == ("a.example", "b.example")
    assert chosen.openai_key and chosen.openai_key.get_secret_value() == "secret"


def test_a_variable_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\n")
    monkeypatch.setenv("TRINITY_CONFIG", str(file))
    assert load([]).port == load().port == 1


@pytest.mark.parametrize(
    ("content", "words"), [("prt = 1\n", "prt"), ("port = 70000\n", "port"), ("port = \n", "line 1"), ("[gateway]\nport = 1\n", "gateway")]
)
def test_a_file_that_cannot_be_names_what_is_wrong(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(SetupError, match=words):
        load(["--config", str(file)])


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no such file"):
        load(["--config", str(tmp_path / "none.toml")])


def test_lists_are_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINITY_ALLOWED_HOSTS", "a.example, b.example,")
    monkeypatch.setenv("TRINITY_CORS_ORIGINS", "")
    assert load([]).allowed_hosts == ("a.example", "b.example")
    assert load([]).cors_origins == ()
    assert load(["--allowed-hosts", "c.example,d.example"]).allowed_hosts == ("c.example", "d.example")


def test_variables_that_are_no_settings_are_nobody_s_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINITY_E2E", "require")
    assert load([]).port == 8080


@pytest.mark.parametrize("name", ["ollama_url", "openai_url"])
@pytest.mark.parametrize("user", ["alice:hush-hush@", "alice@", ":hush-hush@"])
def test_an_address_with_a_user_or_password_is_refused_by_the_setting_s_name_and_not_shown(
    name: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TRINITY_{name.upper()}", f"http://{user}10.0.0.1:1/v1")
    with pytest.raises(SetupError, match=f"{name}: a user or password") as caught:
        load([])
    assert "hush" not in str(caught.value)


def test_a_secret_never_shows_in_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINITY_OPENAI_KEY", "hush-hush")
    assert "hush-hush" not in f"{load([])!r} {load([])}"


def test_keys_lie_in_the_state_unless_they_have_a_file_of_their_own(tmp_path: Path) -> None:
    assert load(["--state", str(tmp_path)]).keys_file == tmp_path / "keys.json"
    assert load(["--state", str(tmp_path), "--keys", "/volume/keys.json"]).keys_file == Path("/volume/keys.json")
