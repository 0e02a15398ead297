"""Gate, promotion and roll-back of the champion as Prefect flows, with a record of who, when and why."""

from prefect import flow, task

from llada_core.settings import ConfigError
from tasks.launch.trial import try_out
from tasks.project import Project
from tasks.work import register as registry


@task(task_run_name="{name}@{version}")
def gate(name: str, version: str) -> str:
    """What speaks for a version, by the gate of params.yaml; fails when the gate does not let it through."""
    decision = registry.gate(Project.at(), name, version)
    if not decision.passed:
        raise ConfigError(f"the gate keeps {name}@{version} back: {decision.reason}; gated=false promotes it anyway")
    return decision.reason


@flow(name="promote", flow_run_name="{name}@{version}", log_prints=True)
def promote(name: str, version: str = "candidate", why: str = "promoted by hand", gated: bool = True) -> str:
    """Make a version (number or alias) champion, once the gate and its weights are verified; returns its number."""
    reason = f"; {gate(name, version)}" if gated else "; without the gate"
    champion = registry.promote(Project.at(), name, version, why + reason, try_out)
    print(f"{name} version {champion.number} is champion: {why}")
    return champion.number


@flow(name="roll-back", flow_run_name="{name}", log_prints=True)
def roll_back(name: str, why: str = "rolled back") -> str:
    """Give the alias back to the champion before the present one; returns its number."""
    champion = registry.roll_back(Project.at(), name, why, try_out)
    print(f"{name} version {champion.number} is champion again: {why}")
    return champion.number
