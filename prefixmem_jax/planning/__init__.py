"""What a train step needs of a pod, found by compiling it without one."""
