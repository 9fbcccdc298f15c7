"""Keys for S3 from a machine's metadata, a role, a process or a file, for both clients; and what gives none."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.answers import Answers, serving
from helpers.empty_store import store

from arplus import storage
from arplus.errors import ArplusError, UsageError
from arplus.prepare.lease import Lease


def test_credentials_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a machine's metadata, as on EC2; once for all threads."""
    asked: list[str] = []
    keys = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t"}

    class Metadata(Answers):
        def answer(self) -> None:
            metadata = self.path.startswith("/latest/")
            asked.extend([self.path] * metadata)
            body = b"role"
            if self.path.endswith("/role"):
                body = json.dumps(keys | {"Expiration": "2099-01-01T00:00:00Z"}).encode()
            self.say(200, body)

    with serving(Metadata) as url:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT"):
            monkeypatch.setenv(name, url)
        assert storage.exists("s3://bucket/key")
        once = len(asked)
        assert once > 0
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(storage.exists, ["s3://bucket/key"] * 20))
        assert len(asked) == once


KEYS_OF_A_ROLE = """
<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ROLE{number}</AccessKeyId>
<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{until}</Expiration>
</Credentials></AssumeRoleResult></AssumeRoleResponse>"""


def test_keys_of_a_role_serve_both_clients_and_are_renewed(aws_settings: Any, tmp_path: Path) -> None:
    """pyarrow's own chain has no such profiles. Keys that end within minutes are renewed at each use."""
    given: list[int] = []

    class Roles(Answers):
        def answer(self) -> None:
            given.append(len(given) + 1)
            until = datetime.now(UTC) + timedelta(minutes=5)
            self.say(200, KEYS_OF_A_ROLE.format(number=given[-1], until=until.isoformat()).encode())

    profile = "[profile p]\nregion = us-east-1\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\n"
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        "[base]\naws_access_key_id = base\naws_secret_access_key = s\n"
    )
    with store() as (endpoint, asked), serving(Roles) as sts:
        aws_settings(profile, AWS_PROFILE="p", AWS_ENDPOINT_URL=endpoint, AWS_ENDPOINT_URL_STS=sts)
        with pytest.raises(UsageError, match="no such file"):
            storage.read_bytes("s3://bucket/key")
        with pytest.raises(UsageError, match="ignores the conditions"):
            Lease.take("s3://bucket/out")
        kept = pickle.dumps(storage.resolve_lasting("s3://bucket/key")[0])
        before = len(given)
        with pytest.raises(FileNotFoundError):
            pickle.loads(kept).open_input_file("bucket/key")
        assert len(given) > before, "what is kept for long asks anew"
    assert b"ROLE" not in kept
    assert {key.rstrip("0123456789") for *_, key in asked} == {"ROLE"}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("credential_process = false", "AWS's keys: .*credential"),
        ("credential_process = /no/such/program", "AWS's keys: .*/no/such/program"),
        ("role_arn = arn:aws:iam::1:role/r\nsource_profile = gone", "AWS's keys: .*gone"),
        ("sso_session = x\nsso_account_id = 1\nsso_role_name = r", "AWS's keys: .*"),
        ("s3 =\n  addressing_style = dns", "addressing_style = dns: must be auto, path or virtual"),
        ("region = eu west", "AWS_REGION=eu west: is not a region's name"),
    ],
)
def test_a_profile_that_gives_no_keys_is_named(aws_settings: Any, profile: str, said: str) -> None:
    aws_settings(f"[default]\n{profile}\n")
    for use in (storage.exists, Lease.take):
        with pytest.raises(ArplusError, match=f"(?s){said}") as caught:
            use("s3://bucket/key")
        assert caught.value.exit_code == 2


def test_keys_of_a_process_and_those_that_a_file_changes_to(aws_settings: Any, tmp_path: Path) -> None:
    keys = {"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "s"}
    (tmp_path / "keys.json").write_text(json.dumps(keys))

    def all_keys() -> set[str]:
        del asked[:]
        with pytest.raises(UsageError, match="no such file"):
            storage.read_bytes("s3://bucket/key")
        with pytest.raises(UsageError, match="ignores the conditions"):
            Lease.take("s3://bucket/out")
        return {key for *_, key in asked}

    with store() as (endpoint, asked):
        aws_settings(f"[default]\ncredential_process = cat {tmp_path}/keys.json\n", AWS_ENDPOINT_URL=endpoint)
        assert all_keys() == {"PROCESS"}
        for name in ("FIRST", "SECOND"):  # as a login of every hour writes them
            text = f"[default]\naws_access_key_id = {name}\naws_secret_access_key = s\n"
            (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(text)
            os.utime(tmp_path / "AWS_SHARED_CREDENTIALS_FILE", (len(name), len(name)))
            assert all_keys() == {name}
