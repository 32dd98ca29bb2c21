mod cli_client;
mod prompt_golden;
