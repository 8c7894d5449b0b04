"""Data for `see demo`: three practical tasks in order of arrival, one unseen task, general questions.

The rows are generated with Faker and Babel, so nothing is downloaded, and the same seed gives the same rows. Each task
asks for a fixed output format, which an instruct model does not produce by itself, and has one right answer, so it is
scored by exact match of the stripped text:

    contacts   contact details in free text   {"name":"Ann Lee","phone":"212-555-0142","email":"a.lee@example.com"}
    dates      a date or an amount as written 2024-03-07, or USD 1234.50
    tickets    a support ticket               billing, shipping, returns, account or technical

It returns rows and queries only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from faker import Faker

Row = dict[str, str]
Draw = Callable[[int], tuple[str, str]]
"""From the row's number to (input, response). A task takes its kinds of input in turn by that number."""


@dataclass(frozen=True)
class DemoTask:
    """One task; rows are `{"prompt": …, "response": …}`."""

    name: str
    title: str
    train: list[Row]
    test: list[Row]


def demo_tasks(rows: int = 160, test_rows: int = 40, seed: int = 0) -> list[DemoTask]:
    """The three tasks in order of arrival: contacts, dates, tickets.

    Args:
        rows: training rows of each task.
        test_rows: test rows of each task; none of their inputs occurs in training.
        seed: with another seed, the same tasks have other rows.
    """
    tasks: list[tuple[str, str, Sequence[str], Callable[[Random], Draw]]] = [
        ("contacts", "contact details in free text to JSON", _CONTACT_INSTRUCTIONS, _contacts),
        ("dates", "dates and amounts to a standard form", _DATE_INSTRUCTIONS, _dates),
        ("tickets", "support tickets to a queue", _TICKET_INSTRUCTIONS, _tickets),
    ]
    demo = []
    for name, title, instructions, maker in tasks:
        rng = Random(f"{name} {seed}")
        pairs = _different(maker(rng), rows + test_rows)
        all_rows = [{"prompt": f"{rng.choice(instructions)}\n{text}", "response": answer} for text, answer in pairs]
        train, test = all_rows[:rows], all_rows[rows:]
        rng.shuffle(train)
        rng.shuffle(test)
        demo.append(DemoTask(name, title, train, test))
    return demo


def unseen_queries(count: int = 20, seed: int = 0) -> list[str]:
    """Queries of a fourth practical task that no expert learns: sorting cities by name."""
    rng = Random(f"unseen {seed}")
    fake = _faker(rng)

    def draw(number: int) -> tuple[str, str]:
        cities = [fake.unique.city() for _ in range(rng.randint(4, 6))]
        fake.unique.clear()
        return ", ".join(cities), ""

    return [f"{rng.choice(_UNSEEN_INSTRUCTIONS)} {text}." for text, _ in _different(draw, count)]


def general_questions() -> list[str]:
    """Forty questions as people ask a chat model; none resembles a task above."""
    return list(_GENERAL_QUESTIONS)


def _different(draw: Draw, count: int) -> list[tuple[str, str]]:
    """`count` pairs with different inputs."""
    pairs: dict[str, str] = {}
    for _ in range(100 * count):
        if len(pairs) == count:
            break
        text, answer = draw(len(pairs))
        pairs.setdefault(text, answer)
    if len(pairs) < count:
        raise ValueError(f"this task has about {len(pairs)} different rows; {count} were asked for")
    return list(pairs.items())


def _faker(rng: Random) -> Faker:
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(rng.getrandbits(32))
    return fake


# contacts -------------------------------------------------------------------------------------

_CONTACT_INSTRUCTIONS = (
    "Extract the contact as JSON with name, phone and email.",
    "Put these contact details into JSON: name, phone, email.",
    "Give me name, phone and email from this text as JSON.",
)
_CONTACT_LAYOUTS = (
    "Best regards,\n{name}\n{phone} | {email}",
    "{name}\n{job}\n{email}\n{phone}",
    "Please call {name} on {phone} or write to {email}.",
    "Hi, this is {name}. My number is {phone} and my mail is {email}.",
    "Questions about the invoice go to {name}, {email}, {phone}.",
    "From: {name} <{email}>\nMobile: {phone}",
    "{name} ({email}) will be in {city} on Monday, tel. {phone}.",
    "Booked for two nights by {name}, phone {phone}, e-mail {email}.",
)


def _contacts(rng: Random) -> Draw:
    fake = _faker(rng)

    def draw(number: int) -> tuple[str, str]:
        first, last = fake.first_name(), fake.last_name()
        user = rng.choice(("{first}.{last}", "{first[0]}.{last}", "{first}{n}", "{last}{n}", "{first[0]}{last}"))
        contact = {
            "name": f"{first} {last}",
            # 555-0100 to 555-0199 belong to nobody, like the example domains.
            "phone": f"{rng.randint(201, 989)}-555-01{rng.randint(0, 99):02d}",
            "email": user.format(first=first.lower(), last=last.lower(), n=rng.randint(10, 99))
            + "@"
            + rng.choice(("example.com", "example.org", "example.net")),
        }
        layout = _CONTACT_LAYOUTS[number % len(_CONTACT_LAYOUTS)]
        text = layout.format(**contact, job=fake.job().split(",")[0], city=fake.city())
        return text, json.dumps(contact, separators=(",", ":"))

    return draw


# dates ----------------------------------------------------------------------------------------

_DATE_INSTRUCTIONS = (
    "Write the date or amount in standard form.",
    "Convert this date or amount to its standard form.",
    "Normalize the date or amount.",
)
# Only forms that can be read in one way: a month's name, never 3/7/24.
_DATE_FORMS = (
    *(("en_US", form) for form in ("full", "long", "medium", "MMMM y, d", "EEE, MMM d, y")),
    *(("en_GB", form) for form in ("full", "long", "medium", "d MMM y", "EEE d MMMM y")),
    *((locale, "long") for locale in ("de_DE", "fr_FR", "es_ES")),
)
_DATE_LAYOUTS = ("{}", "{}", "Due {}", "Invoice of {}", "We meet on {}.", "Signed: {}")
_AMOUNT_FORMS: tuple[tuple[str, Literal["standard", "name"]], ...] = (
    ("en_US", "standard"),
    ("en_US", "name"),
    ("en_GB", "standard"),
    ("en_GB", "name"),
    ("de_DE", "standard"),
)
_AMOUNT_LAYOUTS = ("{}", "{}", "Total: {}", "Pay {} now.", "The price is {}.", "Balance {}")
_CURRENCIES = ("USD", "EUR", "GBP", "INR")


def _dates(rng: Random) -> Draw:
    from babel.dates import format_date
    from babel.numbers import format_currency

    def draw(number: int) -> tuple[str, str]:
        if number % 2:
            cents = rng.randint(100, 10 ** rng.choice((4, 5, 6)))
            currency = rng.choice(_CURRENCIES)
            locale, wording = rng.choice(_AMOUNT_FORMS)
            written = format_currency(cents / 100, currency, locale=locale, format_type=wording)
            layout, answer = rng.choice(_AMOUNT_LAYOUTS), f"{currency} {cents / 100:.2f}"
        else:
            day = date(1995, 1, 1) + timedelta(days=rng.randrange(40 * 365))
            locale, form = rng.choice(_DATE_FORMS)
            written = format_date(day, form, locale=locale)
            layout, answer = rng.choice(_DATE_LAYOUTS), day.isoformat()
        return layout.format(" ".join(written.split())), answer  # split: no-break spaces become plain

    return draw


# tickets --------------------------------------------------------------------------------------

_TICKET_INSTRUCTIONS = (
    "Which queue gets this ticket: billing, shipping, returns, account or technical?",
    "Route this support ticket to billing, shipping, returns, account or technical.",
    "Name the support queue (billing, shipping, returns, account, technical).",
)
_TICKETS = {
    "billing": (
        "I was charged twice for the {product}.",
        "The invoice for my {product} shows the wrong amount.",
        "Please send me an invoice with our VAT number for the {product}.",
        "My card was declined although it has enough money on it.",
        "There is a fee of {amount} dollars on my bill that I do not know.",
        "Can I pay for the {product} in instalments?",
        "The discount code was not taken off my bill.",
        "Why did you take {amount} dollars from my bank account this month?",
        "I need a receipt for the {product} for my tax return.",
        "The price at the till was higher than the one you show for the {product}.",
        "Please change the payment method of my subscription to direct debit.",
        "I have paid invoice {order}, yet I got a reminder.",
    ),
    "shipping": (
        "My {product} has not arrived yet.",
        "The tracking page of parcel {order} has not moved for {days} days.",
        "Can you deliver the {product} to {city} instead?",
        "The courier left my {product} with a neighbour I do not know.",
        "When will order {order} be delivered?",
        "The parcel says delivered, but nothing is here.",
        "Do you ship the {product} to {city}?",
        "Half of order {order} is missing from the box.",
        "I need the {product} before Friday; is express delivery possible?",
        "The driver did not ring and took my parcel back to the depot in {city}.",
        "My {product} has been stuck in customs for {days} days.",
        "You sent my parcel to my old address in {city}.",
    ),
    "returns": (
        "I want to send the {product} back.",
        "The {product} is too small; can I swap it for a larger one?",
        "How do I get a return label for order {order}?",
        "I sent the {product} back {days} days ago and have no refund yet.",
        "I ordered the wrong colour and would like to exchange the {product}.",
        "Can I still return the {product} after {days} days?",
        "My wife already has a {product}, so I would like to give this one back.",
        "The label for sending back order {order} will not print.",
        "Where do I drop off the {product} that I am returning?",
        "I changed my mind about the {product}. How do I hand it back?",
        "Do I have to pay the postage if I return the {product}?",
        "Please collect the {product}; I do not want to keep it.",
    ),
    "account": (
        "I forgot my password and the reset mail never comes.",
        "Please change the e-mail address of my profile to {user}@example.com.",
        "I cannot log in since I have a new phone number.",
        "Please delete my profile and all my data.",
        "My user name {user} is shown wrongly; how do I change it?",
        "Someone else has logged in as me from {city}.",
        "I am locked out after {days} wrong passwords.",
        "How do I turn on two-step login?",
        "I have two profiles with you and want to merge them.",
        "The code for signing in does not reach my phone.",
        "Please take {user} off your newsletter.",
        "How do I add my colleague {user} as a second user?",
    ),
    "technical": (
        "The {product} does not turn on any more.",
        "The app crashes whenever I open the settings of the {product}.",
        "My {product} will not connect to the wifi.",
        "After the last update the {product} shows error {code}.",
        "The {product} gets very hot and switches itself off.",
        "How do I reset the {product} to factory settings?",
        "The battery of the {product} is empty after {days} hours.",
        "The {product} makes a loud noise when it starts.",
        "Bluetooth pairing with the {product} fails with code {code}.",
        "The screen of my {product} flickers.",
        "The update of the {product} stops at {days} percent.",
        "Your site shows error {code} on every page.",
    ),
}
_PRODUCTS = (
    "kettle", "toaster", "headphones", "tablet", "camera", "printer", "lamp", "desk fan", "blender", "smart watch",
    "coffee machine", "vacuum cleaner", "speaker", "keyboard", "monitor", "hair dryer", "electric bike", "drill",
    "doorbell", "heater", "projector", "microwave", "shaver", "router",
)  # fmt: skip
_OPENINGS = ("", "", "Hello,", "Hi there,", "Good morning,", "Dear team,", "This is {name}.", "My name is {name}.")
_CLOSINGS = ("", "", "Thanks!", "Please help.", "Regards, {name}", "Best, {name}", "Order {order}.", "It is urgent.")


def _tickets(rng: Random) -> Draw:
    fake = _faker(rng)
    queues = list(_TICKETS)

    def draw(number: int) -> tuple[str, str]:
        queue = queues[number % len(queues)]
        parts = rng.choice(_OPENINGS), rng.choice(_TICKETS[queue]), rng.choice(_CLOSINGS)
        text = " ".join(filter(None, parts)).format(
            product=rng.choice(_PRODUCTS),
            name=fake.first_name(),
            user=fake.first_name().lower(),
            city=fake.city(),
            order=rng.randint(10000, 99999),
            amount=rng.randint(5, 300),
            days=rng.randint(3, 30),
            code=rng.randint(10, 599),
        )
        return text, queue

    return draw


# what no expert learns ------------------------------------------------------------------------

_UNSEEN_INSTRUCTIONS = ("Sort these cities from A to Z:", "Put these city names into alphabetical order:")
_GENERAL_QUESTIONS = (
    # facts
    "Why is the sky blue?",
    "What is the capital of Australia?",
    "Who painted the Mona Lisa?",
    "How do vaccines work?",
    "What is the difference between weather and climate?",
    "Why do cats purr?",
    "How far away is the Moon?",
    "What caused the First World War?",
    # advice
    "How can I sleep better at night?",
    "I have a job interview next week. How should I prepare?",
    "What should I cook with leftover rice and two eggs?",
    "How do I start running as a complete beginner?",
    "My houseplant has yellow leaves. What am I doing wrong?",
    "What are good ways to save money as a student?",
    "How do I tell a friend that I cannot come to her wedding?",
    "Which books would you give to a twelve-year-old who likes space?",
    # writing
    "Write a short poem about autumn.",
    "Write a funny limerick about a lazy dog.",
    "Tell me a bedtime story about a dragon who is afraid of fire.",
    "Suggest five names for a small bakery by the sea.",
    "Describe a thunderstorm to someone who has never seen one.",
    "Write the opening sentence of a detective novel.",
    "Explain gravity as if I were five years old.",
    "Make this sentence more polite: Give me the report now.",
    # maths
    "What is 17 times 23?",
    "If a train covers 180 km in two hours, how fast is it?",
    "What is the derivative of x squared plus 3x?",
    "How many edges does a cube have?",
    "Is 91 a prime number?",
    "What does the Pythagorean theorem say?",
    # code
    "Write a Python function that reverses a string.",
    "What is the difference between a list and a tuple in Python?",
    "How do I undo my last commit in git?",
    "What does SELECT DISTINCT do in SQL?",
    "Explain recursion with a small example.",
    # small talk
    "Hello! How are you today?",
    "Do you have a favourite colour?",
    "Tell me a joke.",
    "What can you help me with?",
    "I am bored. What could we talk about?",
)
