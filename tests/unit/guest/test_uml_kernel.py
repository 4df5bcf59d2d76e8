"""User-mode Linux: which one is chosen, and a kernel that would lack a driver."""

from __future__ import annotations

import pytest

from guest.boot import uml, uml_kernel
from guest.boot.uml import chosen_suite
from guest.boot.uml_kernel import check_configuration, configuration
from guest.debian.cache import PrepareError


def test_a_kernel_that_does_not_take_a_driver_is_refused_by_its_name() -> None:
    wanted = configuration()
    got = wanted.replace("CONFIG_I2C_VIRTIO=y\n", "# CONFIG_I2C_VIRTIO is not set\n")
    with pytest.raises(PrepareError, match=r"^this kernel's source does not take CONFIG_I2C_VIRTIO=y$"):
        check_configuration(wanted, got)


def test_what_only_some_versions_know_may_be_missing() -> None:
    wanted = configuration()
    check_configuration(wanted, wanted.replace("CONFIG_GPIO_SYSFS_LEGACY=y\n", ""))


def test_the_kernel_of_a_run_is_that_of_the_environment_or_6_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERBELL_UML", raising=False)
    assert chosen_suite(uml.SUITES, "") == chosen_suite(uml_kernel.SUITES, "") == "bookworm"
    monkeypatch.setenv("HYPERBELL_UML", "7.2")
    assert chosen_suite(uml.SUITES, "") == "sid"
    assert chosen_suite(uml.SUITES, "6.1") == "bookworm"


def test_a_kernel_that_cannot_be_had_is_named_beside_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERBELL_UML", "5.10")
    with pytest.raises(PrepareError, match=r"no User-mode Linux 5\.10 \(HYPERBELL_UML\); known are 6\.1, 7\.2$"):
        chosen_suite(uml.SUITES, "")
