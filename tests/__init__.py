"""Tests of dsqjob; README.md in this folder says which rooms there are and what they cost."""
