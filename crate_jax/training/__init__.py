"""The loop, the state and the one jitted step. This room knows the interface of a method, but not any method."""
