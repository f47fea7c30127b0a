"""The words of QEMU's command line: options, and the ``key=value,…`` lists or JSON objects in them.

As QEMU does it in system/vl.c, util/qemu-option.c and util/keyval.c. Knows no option's meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vnet_lock.dataclass import dataclass

# Options without a value, of QEMU 7 to 10 (qemu-options.hx, HAS_ARG absent), all targets.
_NO_VALUE = frozenset(
    word
    for line in (
        "h help version S s snapshot nographic daemonize enable-kvm enable-fips no-reboot no-shutdown",
        "mem-prealloc curses full-screen no-user-config nodefaults usb win2k-hack no-acpi no-hpet",
        "no-fd-bootchk singlestep no-quit alt-grab ctrl-grab no-frame sdl portrait show-cursor semihosting",
        "only-migratable enable-sync-profile preconfig xen-attach xen-domid-restrict perfmap jitdump",
        "old-param no-kvm",
    )
    for word in line.split()
)
NETWORKS = ("netdev", "net", "nic")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of the command line with its value, or one word that is none (a disk image)."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Without its one or two dashes; empty for a word that is no option."""
        word = self.words[0]
        return "" if not word.startswith("-") else word[2 if word.startswith("--") else 1 :]

    @property
    def value(self) -> str:
        """Empty where there is none."""
        return self.words[1] if len(self.words) > 1 else ""

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return " ".join(self.words)


def split_options(args: Sequence[str]) -> tuple[Option, ...]:
    """The options in a QEMU command line (without the program)."""
    options: list[Option] = []
    at = 0
    while at < len(args):
        option = Option(tuple(args[at : at + 1]))
        following = Option(tuple(args[at + 1 : at + 2] or ("",)))
        # No value reads "-netdev": what stands before such a word has none, and is newer than our list.
        has_value = option.name and option.name not in _NO_VALUE and following.name not in NETWORKS
        options.append(Option(tuple(args[at : at + 2])) if has_value else option)
        at += len(options[-1].words)
    return tuple(options)


@dataclass(frozen=True, slots=True)
class Properties:
    """``key=value,…`` (a comma inside a value written twice) or a JSON object; None is a key alone."""

    items: tuple[tuple[str, Any], ...]
    is_json: bool = False

    @classmethod
    def parse(cls, text: str, implied: str) -> Properties:
        """``implied`` is the key of a first word without "="; ValueError where it is broken JSON."""
        if not text.startswith("{"):
            return cls.parse_words(text, implied)
        from json import JSONDecodeError, loads  # 3 ms, and rare

        try:
            return cls(tuple(loads(text).items()), True)
        except JSONDecodeError:
            raise
        except ValueError:  # int()'s own
            raise ValueError("a number has too many digits") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None

    @classmethod
    def parse_words(cls, text: str, implied: str) -> Properties:
        """As ``parse``, of an option that QEMU never takes as JSON."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")] if text else []
        items: list[tuple[str, Any]] = []
        for word in words:
            key, equals, value = word.partition("=")
            if equals:
                items.append((key, value))
            else:
                items.append((key, None) if items else (implied, key))
        return cls(tuple(items))

    def get(self, key: str) -> str | None:
        """A value as text, the last one as QEMU takes it; None where there is none."""
        values = self.values(key)
        return values[-1] if values else None

    def values(self, key: str) -> tuple[str, ...]:
        """All values of a key that may be there several times, or have a JSON list."""
        found = [value for known, value in self.items if known == key and value is not None]
        return tuple(str(one) for value in found for one in (value if isinstance(value, list) else [value]))

    def only(self, keys: Sequence[str]) -> Properties:
        """Those of some keys."""
        return Properties(tuple(item for item in self.items if item[0] in keys), self.is_json)

    def having(self, key: str, value: object) -> Properties:
        """With one more, unless the key is there."""
        if value is None or self.get(key) is not None:
            return self
        return Properties((*self.items, (key, value)), self.is_json)

    @property
    def text(self) -> str:
        """As QEMU reads it, in the form in which it came."""
        if self.is_json:
            from json import dumps

            return dumps(dict(self.items), separators=(",", ":"))
        words = []
        for at, (key, value) in enumerate(self.items):
            shown = ("on" if value else "off") if isinstance(value, bool) else str(value).replace(",", ",,")
            is_implied = at == 0 and key in ("type", "driver", "backend", "qom-type") and "=" not in shown
            words.append(key if value is None else shown if is_implied else f"{key}={shown}")
        return ",".join(words)
