"""The checkout as it is submitted: a commit that holds its tracked files, and worktrees of it; a list of files without git.

Knows git's command line; does not know what workspaces are for. Whatever surrounds a call (a hook's GIT_DIR, hooks of the
repository, a missing identity) changes nothing.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from llada_core.settings import ConfigError
from tasks.folders import content_hash, files_in, hash_of, write_text

LEFT_OUT = ("data", "models", "runs", "store", "workspaces", "mlartifacts", "mlruns", "build", "dist", "__pycache__")
WHO = {f"GIT_{role}_{what}": "lladaflow" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
HERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


def has_git(root: Path) -> bool:
    """Whether `root` is a checkout of its own, and git is there to ask."""
    return (root / ".git").exists() and shutil.which("git") is not None


def commit_of(root: Path) -> str:
    """The commit that a checkout is at, `+changes` if tracked files differ from it; "no git" outside of git."""
    if shutil.which("git") is None:
        return "no git"
    done = _run(root, "rev-parse", "HEAD")
    commit = done.stdout.strip()
    if done.returncode:
        return "no git"
    return commit + ("+changes" if _run(root, "status", "--porcelain", "-uno").stdout.strip() else "")


def submitted(root: Path) -> tuple[str | None, str]:
    """What was submitted: a commit that holds the tracked files as they are now, and the hash of its content.

    The commit is the present one where nothing differs, else one that no branch has. None without git: then the hash is
    that of the files.
    """
    if not has_git(root):
        files = [file for file in copied(root) if file.suffix in (".py", ".yaml", ".jinja", ".json")]
        return None, hash_of([[str(file.relative_to(root)), content_hash(file)] for file in files])
    _refuse_copied(root)
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / f"lladaflow-index.{os.getpid()}"
    try:  # an index of its own: the person's keeps what it has staged
        if (theirs := index.with_name("index")).exists():
            shutil.copyfile(theirs, index)
        git(root, "add", "--update", ".", index=index)
        tree = git(root, "write-tree", index=index)
    finally:
        index.unlink(missing_ok=True)
    head = _run(root, "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
    if head and git(root, "rev-parse", f"{head}^{{tree}}") == tree:
        return head, tree
    parent = ["-p", head] if head else []
    return git(root, "commit-tree", tree, *parent, "-m", "as submitted"), tree


def add_worktree(root: Path, place: Path, commit: str) -> None:
    """Put the files of a commit into a new worktree at `place`; what a making that was cut short left there goes."""
    shutil.rmtree(place, ignore_errors=True)
    prune_worktrees(root, place.parent)
    git(root, "worktree", "add", "--quiet", "--force", "--force", "--detach", str(place), commit)
    mend_worktree(root, place)


def prune_worktrees(root: Path, workspaces: Path) -> None:
    """Let git forget worktrees whose folder is gone; those that only moved are mended first, or it would forget them."""
    for file in workspaces.glob("*/.git"):
        with contextlib.suppress(ConfigError, OSError):
            mend_worktree(root, file.parent)
    git(root, "worktree", "prune")


def mend_worktree(root: Path, place: Path) -> None:
    """Let a worktree and its repository find one another where they lie now; neither touches what they were copied from.

    Git notes both as whole paths. The worktree's own note becomes a relative one, which a later move leaves true; the
    repository's is what `git worktree prune` goes by. Raises `ConfigError` where the repository has lost the worktree.
    """
    if not has_git(root):
        raise ConfigError(
            f"{place} is a worktree of git, and {root} has no git any more; remove the folder and run again"
        )
    name = Path((place / ".git").read_text(encoding="utf-8").partition(":")[2].strip()).name
    common = root / git(root, "rev-parse", "--git-common-dir")
    admin = common.resolve() / "worktrees" / name
    if not (admin / "gitdir").exists():
        raise ConfigError(f"git does not know {place} any more; remove the folder and run again")
    back, there = f"{place.resolve() / '.git'}\n", f"gitdir: {os.path.relpath(admin, place.resolve())}\n"
    for file, text in ((admin / "gitdir", back), (place / ".git", there)):
        if file.read_text(encoding="utf-8") != text:
            write_text(file, text)


def _refuse_copied(root: Path) -> None:
    """Raises `ConfigError` for a copy of a worktree: git takes it for the original, whose repository it would change."""
    file = root / ".git"
    if not file.is_file():
        return
    note = root / file.read_text(encoding="utf-8").partition(":")[2].strip() / "gitdir"
    original = (
        Path(note.read_text(encoding="utf-8").strip()) if note.is_file() else file
    )  # a submodule has no such note
    if original.exists() and not original.samefile(file):
        ways = "remove its file .git to run without git, or make one with `git worktree add` or `git clone`"
        raise ConfigError(f"{root} is a copy of the git worktree {original.parent}; {ways}")


def copied(root: Path) -> list[Path]:
    """The files of a checkout without git that are its own: nothing hidden but .dvc's settings, nothing made."""
    hidden = [root / ".dvcignore", root / ".dvc" / "config"]
    entries = [p for p in sorted(root.iterdir()) if p.name not in LEFT_OUT and not p.name.startswith(".")]
    return [file for entry in [*hidden, *entries] if entry.exists() for file in files_in(entry)]


def git(root: Path, *arguments: str, index: Path | None = None) -> str:
    """What a git command prints; raises `ConfigError` with git's own words."""
    done = _run(root, *arguments, index=index)
    if done.returncode:
        moved = "not a git repository" in done.stderr and (root / ".git").is_file()
        remedy = f"; after a move `git worktree repair '{root}'`, in the repository, finds it again" if moved else ""
        raise ConfigError(f"git {' '.join(arguments[:2])}: {' '.join(done.stderr.split())}{remedy}")
    return done.stdout.strip()


def _run(root: Path, *arguments: str, index: Path | None = None) -> subprocess.CompletedProcess[str]:
    surroundings = {key: value for key, value in os.environ.items() if key not in HERE} | WHO
    own = {"GIT_INDEX_FILE": str(index)} if index else {}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *arguments]
    return subprocess.run(command, cwd=root, env=surroundings | own, capture_output=True, text=True, check=False)
