"""The small words of CloudFormation templates and IAM policies, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def ref(name: str) -> Json:
    """The value of a parameter, or what a resource is called in the end."""
    return {"Ref": name}


def arn(logical: str) -> Json:
    """The ARN of the stack's resource of that name."""
    return {"Fn::GetAtt": [logical, "Arn"]}


def named(service: str, resource: str) -> Json:
    """The ARN of something in the stack's own account and region, whoever has made it."""
    return {"Fn::Sub": f"arn:${{AWS::Partition}}:{service}:${{AWS::Region}}:${{AWS::AccountId}}:{resource}"}


def text(description: str, default: str = "") -> Json:
    """A parameter that is any text."""
    return {"Type": "String", "Description": description, "Default": default}


def number(description: str, default: int, least: int, most: int) -> Json:
    """A parameter that is a number between `least` and `most`."""
    limits = {"MinValue": least, "MaxValue": most}
    return {"Type": "Number", "Description": description, "Default": default, **limits}


def one_of(description: str, default: int, values: Sequence[int]) -> Json:
    """A parameter that is one of those numbers."""
    allowed = {"AllowedValues": list(values)}
    return {"Type": "Number", "Description": description, "Default": default, **allowed}


def choice(description: str, values: Sequence[str]) -> Json:
    """A parameter that is one of those texts, the first one unless somebody says otherwise."""
    return {**text(description, values[0]), "AllowedValues": list(values)}


def trust(service: str, condition: Json | None = None) -> Json:
    """Who may take a role on: that service of AWS, on that condition."""
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": f"{service}.amazonaws.com"},
        "Action": "sts:AssumeRole",
        **({"Condition": condition} if condition else {}),
    }
    return {"Version": "2012-10-17", "Statement": [statement]}


def allow(actions: Sequence[str], resources: Sequence[Json]) -> Json:
    """A policy's statement."""
    return {"Effect": "Allow", "Action": list(actions), "Resource": list(resources)}


def policy(*statements: Json) -> Json:
    """A role's own policy."""
    document = {"Version": "2012-10-17", "Statement": list(statements)}
    return {"PolicyName": "flowlane", "PolicyDocument": document}
