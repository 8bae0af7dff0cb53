"""What is known of operators: the table of rules, and arithmetic that several of them share."""
