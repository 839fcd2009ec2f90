"""The command line.

A subcommand is a module with `SUMMARY`, `add_arguments(parser)` and `run(arguments) -> exit status`, listed in
`nsa_compile.cli.main.COMMANDS`.
"""
