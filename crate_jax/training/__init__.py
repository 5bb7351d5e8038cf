"""The loop, the state and the one jitted step. Knows the interface of a method, and no method."""
