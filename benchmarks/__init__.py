"""What the operators cost and what the methods buy: ``speed``, ``papers``, and their results."""
