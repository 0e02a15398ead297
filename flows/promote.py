"""Promotion and roll-back of the champion as Prefect flows, with a record of who, when and why."""

from pathlib import Path

from prefect import flow

from tasks import promote as registry


@flow(name="promote", flow_run_name="{name}@{version}", log_prints=True)
def promote(name: str, version: str = "candidate", why: str = "promoted by hand") -> str:
    """Make a version (number or alias) champion, once its weights are verified; returns its number."""
    champion = registry.promote(Path.cwd(), name, version, why)
    print(f"{name} version {champion.number} is champion: {why}")
    return champion.number


@flow(name="roll-back", flow_run_name="{name}", log_prints=True)
def roll_back(name: str, why: str = "rolled back") -> str:
    """Give the alias back to the champion before the present one; returns its number."""
    champion = registry.roll_back(Path.cwd(), name, why)
    print(f"{name} version {champion.number} is champion again: {why}")
    return champion.number
