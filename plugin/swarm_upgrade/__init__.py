"""`freeflow upgrade`: brings a new version of the plugin to all hosts of a Swarm, one by one.

Read `rollout.py` (the order), then `upgrade_task.py` (the task that does it on a host) and
`plugin_agent.py`, which runs in that task.
"""
