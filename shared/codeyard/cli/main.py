"""`codeyard`: demo, up, gateway, worker, submit, result, cancel, jobs, dead, keys, models, backup, doctor, drill,
simulate."""

import importlib

import click

COMMANDS = {
    "demo": ("codeyard.cli.demo", "demo"),
    "up": ("codeyard.cli.serve", "up"),
    "gateway": ("codeyard.cli.serve", "gateway"),
    "worker": ("codeyard.cli.serve", "worker"),
    "submit": ("codeyard.cli.jobs", "submit"),
    "result": ("codeyard.cli.jobs", "result"),
    "cancel": ("codeyard.cli.jobs", "cancel"),
    "jobs": ("codeyard.cli.jobs", "jobs"),
    "dead": ("codeyard.cli.dead", "dead"),
    "keys": ("codeyard.cli.keys", "keys"),
    "models": ("codeyard.cli.models", "models"),
    "backup": ("codeyard.cli.backup", "backup"),
    "doctor": ("codeyard.cli.doctor", "doctor"),
    "drill": ("codeyard.cli.drill.command", "drill"),
    "simulate": ("codeyard.worker.simulation.cli", "simulate"),
}


class _Lazy(click.Group):
    """Imports a command when it is named, so that `codeyard submit` does not wait for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="codeyard")
def main() -> None:
    """Durable code-generation jobs: submit, batch on GPU workers, poll or stream.

    \b
    Try it on this machine, nothing else needed:
      codeyard demo                     the main job, start to end
      codeyard up                       gateway and worker, embedded
      codeyard submit 'def add(a, b):'  a job; then: codeyard result ID
      codeyard doctor                   what is wrong here, and the way out

    On a fleet, set CODEYARD_BROKER_URL=amqp://... and CODEYARD_STORE_URL=redis://... (or --broker,
    --store, or codeyard.yaml); nothing else changes.
    """


if __name__ == "__main__":
    main()
