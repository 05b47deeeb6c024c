"""Rendezvous: a key has one home, a death moves its own keys only, names hold no password."""

from collections import Counter

import pytest

from tw_recipes.decoding import replicas
from tw_recipes.decoding.replicas import Replicas

URLS = [f"http://node{n}:8000/v1" for n in range(4)]
KEYS = [f"problem-{n}#0" for n in range(2000)]


def homes(group: Replicas) -> dict[str, str]:
    return {key: group.pick(key).name for key in KEYS}


def test_every_process_sends_a_key_to_the_same_replica_and_shares_are_even():
    first, second = homes(Replicas(URLS)), homes(Replicas(URLS[::-1]))
    assert first == second
    assert all(400 < count < 600 for count in Counter(first.values()).values())


def test_a_death_moves_the_keys_of_the_dead_alone_and_spreads_them():
    group = Replicas(URLS)
    before = homes(group)
    group.all[1].bury()
    after = homes(group)
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {before[key] for key in moved} == {"node1:8000"}
    assert all(count > 100 for count in Counter(after[key] for key in moved).values())
    assert "node1:8000" not in after.values()


def test_keys_come_home_after_a_while_and_stay_home_if_all_are_dead(monkeypatch):
    group = Replicas(URLS)
    before = homes(group)
    for replica in group.all:
        replica.bury()
    assert homes(group) == before
    group.all[0].dead_until = 0.0
    assert set(homes(group).values()) == {"node0:8000"}
    monkeypatch.setattr(replicas, "REVIVE_AFTER_S", -1.0)
    group.all[0].bury()
    for replica in group.all:
        replica.dead_until = 0.0
    assert homes(group) == before


def test_names_hold_neither_user_nor_password():
    assert Replicas(["https://me:secret@host/v1"]).all[0].name == "host"
    assert Replicas(["https://me:secret@host:8443/v1/"]).all[0].name == "host:8443"


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "at least one URL, got none"),
        (["localhost:8000"], r"http\(s\) URLs, got 'localhost:8000'"),
        ([URLS[0], URLS[0] + "/"], "distinct, got one of them twice"),
    ],
)
def test_bad_urls_are_refused(urls, message):
    with pytest.raises(ValueError, match=message):
        Replicas(urls)
