"""The command line: words in, one library call, tables out. The only place that prints or exits."""
