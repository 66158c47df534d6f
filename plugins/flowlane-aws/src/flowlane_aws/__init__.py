"""flowlane on AWS: the backend ``aws://`` (a DynamoDB log, SQS queues, Kinesis channels), and S3, DynamoDB,
SNS and Secrets Manager as connectors. Nothing of the SDK is imported before the first such URI is opened."""
