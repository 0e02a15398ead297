"""Task definitions that lm-eval 0.4.13 lacks, or that its own need a download or another antlr for.

The YAML files are lm-eval's; a name that lm-eval also has (humaneval, mbpp, minerva_math) stands for the same
prompt and scoring here. The Python files hold what the YAML files call.
"""
