"""Workers as jobs of a Slurm cluster: scripts that submitit writes and sends, and the process that each job runs.

Nothing here knows what a stage does; ``batch`` starts the same ``dsqjob worker`` as every launcher.
"""
