mod prompt_golden;
