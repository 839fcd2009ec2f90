"""The module side of learned parts: what they are, how modules carry them, how they run, where they are kept."""
