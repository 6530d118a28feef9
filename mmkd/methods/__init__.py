"""Published ways to teach a two-stage detector, one file each; docs/methods.md is their table."""
