"""Logs as releases of flowlane stored them, and the states that they fold to; see ``make``."""
