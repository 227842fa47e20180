"""The app that SuperLink and SuperNodes run; client apps are new processes and import little."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcmp.federate.engines.flower.link import app_that_says, relay, serve

client_app = app_that_says(relay)
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment named in the run's configuration."""
    from fedcmp.components import load

    serve(grid, context, load)
