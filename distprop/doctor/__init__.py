"""The command `distprop doctor`: what a machine, its MPI and its BLAS are, and what to do about what is amiss.

A check is a function that looks at one thing and returns a `Finding`. `check_host` runs those of one machine,
`check_job` adds what only several ranks can tell, and `examine` starts these, here or on other hosts, which it surveys
first. Nothing here needs MPI to be installed, and no check ends the others by failing.
"""

from __future__ import annotations

from distprop.doctor.examination import examine
from distprop.doctor.finding import Finding, show, to_json, worst
from distprop.doctor.host import check_host
from distprop.doctor.job import check_job

__all__ = ["Finding", "check_host", "check_job", "examine", "show", "to_json", "worst"]
