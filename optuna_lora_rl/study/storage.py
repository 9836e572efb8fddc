"""Opens the database of a study, and turns its failures into one clear sentence."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from pydantic import ValidationError

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.errors import quoted

# The SQLite file of a study in its output folder.
DATABASE = "study.db"
# Seconds. A worker that has been silent for the grace period counts as dead; it is long enough
# for a laptop's short sleep and a database's restart.
HEARTBEAT_INTERVAL = 60
GRACE_PERIOD = 300
# How long a writer waits for another one's SQLite transaction.
_SQLITE_TIMEOUT = 30
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EROFS, errno.EACCES, errno.EPERM}
# A disk or network folder that fails, and too many open files.
_BROKEN = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
_FATAL = _NO_ROOM | _NO_RIGHT | _BROKEN


def open_storage(url: str, *, heartbeat: bool = False) -> RDBStorage:
    """Connects to the database, which gets its tables if it has none.

    Args:
        url: An SQLAlchemy URL, such as ``sqlite:///runs/dates/study.db``. The folder of an SQLite
            file is created.
        heartbeat: Whether running trials give signs of life, and those of others are looked for.

    Raises:
        UserError: If the URL is malformed, or the database cannot be reached or written.
    """
    _check(url)
    _make_folder(url)
    with database_errors(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for wait in (0.2, 0.4, 0.8, 1.6, None):
            try:
                return RDBStorage(
                    # Optuna fills in braces.
                    url.replace("{", "{{").replace("}", "}}"),
                    engine_kwargs={"connect_args": _connect_args(url)},
                    heartbeat_interval=HEARTBEAT_INTERVAL if heartbeat else None,
                    grace_period=GRACE_PERIOD,
                )
            except Exception as error:
                # Workers that start together all find no tables and all create them; the
                # slower ones find them there at the next try.
                if isinstance(error, TypeError | ValueError | OverflowError):
                    # What the driver says of an option in the URL that it does not take.
                    raise UserError(_database_sentence(url, error)) from None
                if wait is None or not _is_race(error):
                    raise
                time.sleep(wait)
    raise AssertionError("unreachable")


def has_tables(url: str) -> bool:
    """Whether the database can be reached and has Optuna's tables; creates nothing.

    Args:
        url: As in ``open_storage``; an SQLite file has to be there.

    Raises:
        UserError: As ``open_storage`` does.
    """
    from sqlalchemy import create_engine
    from sqlalchemy import inspect
    from sqlalchemy.pool import NullPool

    _check(url)
    _make_folder(url)
    with database_errors(url):
        try:
            engine = create_engine(url, connect_args=_connect_args(url), poolclass=NullPool)
            with engine.connect() as connection:
                return bool(inspect(connection).has_table("studies"))
        except (ImportError, TypeError, ValueError, OverflowError) as error:
            # A driver that is missing, or an option in the URL that it does not take.
            raise UserError(_database_sentence(url, error)) from None


def _connect_args(url: str) -> dict[str, float]:
    return {"timeout": _SQLITE_TIMEOUT} if url.startswith("sqlite") else {}


def _is_race(error: Exception) -> bool:
    from sqlalchemy import exc

    words = str(error).lower()
    return isinstance(error, exc.DatabaseError) and any(
        word in words for word in ("already exists", "unique", "duplicate")
    )


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Raises ``UserError`` in place of whatever the database or the disk raises inside.

    Args:
        url: The storage's URL, named in the sentence without its password.
    """
    from sqlalchemy import exc

    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise UserError(_database_sentence(url, error.__cause__ or error)) from None
    except exc.SQLAlchemyError as error:
        raise UserError(_database_sentence(url, error)) from None
    except (ImportError, RuntimeError) as error:
        # Optuna's own words when a driver is missing, and when another Optuna made the tables.
        if "DB access module" not in str(error) and "table schema" not in str(error):
            raise
        raise UserError(_database_sentence(url, error)) from None
    except OSError as error:
        if error.errno not in _FATAL:
            raise
        raise UserError(disk_sentence(error)) from error


@contextmanager
def read(url: str) -> Iterator[None]:
    """Raises ``UserError`` where what a database holds makes no sense to Optuna.

    Args:
        url: The storage's URL, named in the sentence without its password.
    """
    try:
        with database_errors(url):
            yield
    except UserError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = f"{'.'.join(map(str, first['loc']))} is {quoted(first['input'])}"
        raise UserError(
            f"storage: the database {without_password(url)} holds what cannot be read, so it is "
            f"damaged or another program's ({detail})"
        ) from None


def disk_sentence(error: OSError) -> str:
    """What to say when a file cannot be written."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in _NO_ROOM:
        return (
            f"no room is left on the disk{where} ({error.strerror}); every finished trial is kept:"
            " free some space and run the same command again"
        )
    if error.errno in _BROKEN:
        return (
            f"the system cannot read or write{where} ({error.strerror}); every finished trial is "
            "kept, and the same command goes on where it stopped"
        )
    return f"{error.filename} cannot be written ({error.strerror}); choose another output folder"


def fatal_cause(error: BaseException) -> BaseException | None:
    """The failure of disk or database that is behind ``error``, or None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, optuna.exceptions.StorageInternalError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _FATAL:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def without_password(url: str) -> str:
    """The URL as it may be printed: no password, no query."""
    return masked(f"'{url}'")[1:-1].partition("?")[0]


def sqlite_url(file: Path) -> str:
    """The URL of an SQLite file, whatever characters its path has."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL, or None for another database or one in memory."""
    from sqlalchemy import exc
    from sqlalchemy import make_url

    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        # Said in a sentence where the database is opened.
        return None
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


def _check(url: str) -> None:
    """Refuses a URL that SQLAlchemy takes apart at another place than its writer."""
    from sqlalchemy import exc
    from sqlalchemy import make_url

    try:
        host = make_url(url).host or ""
    except exc.ArgumentError as error:
        raise UserError(_database_sentence(url, error)) from None
    except ValueError:
        raise UserError(
            f"storage: the port of {without_password(url)} is no number; write "
            "postgresql://user:password@host:5432/name"
        ) from None
    if "@" in host:
        raise UserError(
            f"storage: the password of {without_password(url)} holds an @, which a URL writes as "
            "%40"
        )


def _make_folder(url: str) -> None:
    file = sqlite_file(url)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"storage: the folder {file.parent} cannot be created ({error.strerror}); choose "
            "another output folder or storage"
        ) from error
    if file.is_dir():
        raise UserError(f"storage: {file} is a folder; name the database's file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(
            f"storage: {file} cannot be written by this user; choose another output folder or "
            "storage"
        )


def _database_sentence(url: str, error: BaseException) -> str:
    """One sentence on a database's failure; finished trials are safe in every case."""
    from sqlalchemy import exc

    where = without_password(url)
    cause = getattr(error, "orig", None) or error
    detail = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(error, exc.NoSuchModuleError | exc.ArgumentError):
        return (
            f"storage: {where} is not a database URL; use one such as sqlite:///study.db or "
            "postgresql://user@host/name"
        )
    if isinstance(error, ImportError):
        driver = getattr(error.__cause__ or error, "name", None) or "its driver"
        return (
            f"storage: {where} needs the package {driver}, which is not installed; for "
            "postgresql:// use pip install 'optuna_lora_rl[postgresql]'"
        )
    if "locked" in detail:
        return (
            f"storage: the database {where} is locked by another program; close it, or use "
            "PostgreSQL for several workers, and run the same command again"
        )
    if "full" in detail or "disk I/O" in detail:
        return (
            f"storage: the database {where} cannot grow, the disk is full ({detail}); every "
            "finished trial is kept: free some space and run the same command again"
        )
    if "readonly" in detail or "read-only" in detail:
        return f"storage: the database {where} cannot be written ({detail})"
    if "not a database" in detail or "malformed" in detail:
        return f"storage: {where} is no SQLite database or is damaged ({detail})"
    return f"storage: the database {where} cannot be used: {detail}"
