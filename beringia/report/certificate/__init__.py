"""What a certificate looks like: its page, its table on a terminal, its JUnit file for CI systems."""

from beringia.report.certificate.junit import write_junit
from beringia.report.certificate.page import write_certificate_page
from beringia.report.certificate.terminal import print_certificate

__all__ = ["print_certificate", "write_certificate_page", "write_junit"]
