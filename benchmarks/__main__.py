"""All benchmarks, one after the other: `make bench`."""

from pathlib import Path

from benchmarks import champion, likelihood, sampling

if __name__ == "__main__":
    sampling.main()
    likelihood.main()
    folder = Path("models/grpo")
    if folder.exists():
        champion.main(folder.resolve())
    else:
        print("no models/grpo: call `make run` first to see what approximate modes cost the champion")
