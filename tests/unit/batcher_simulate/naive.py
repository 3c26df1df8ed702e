"""A worker that walks every step and looks at every sequence: the oracle of the fast one."""

from math import inf

PAGE = 512


class Held:
    """A request here, all counted one by one."""

    def __init__(self, number, arrival, order):
        self.number, self.order, self.prefix = number, order, arrival.prefix
        self.prompt, self.output = arrival.prompt_tokens, arrival.output_tokens
        self.generated = self.context = self.own_blocks = self.preemptions = 0
        self.pages = []
        self.target = self.prompt
        self.decoding = False
        self.cached = None


class NaiveWorker:
    """Same rules, no arithmetic: blocks are counted afresh whenever they matter."""

    def __init__(self, profile):
        self.profile, self.due = profile, inf
        self.waiting, self.running = [], []
        self.cache = {}
        """When each page was last let go, by page; inf while a sequence uses it."""
        self.let_go = 0
        self.landed = 0
        self.chunks = []
        self.ended = {}
        self.first = {}

    def blocks(self, tokens):
        return -(-tokens // self.profile.block_tokens)

    def free(self):
        """Blocks that are not in use, those of idle pages included."""
        page_blocks = PAGE // self.profile.block_tokens
        used_pages = {page for each in self.running for page in each.pages}
        own = sum(each.own_blocks for each in self.running)
        return self.profile.total_blocks - own - len(used_pages) * page_blocks

    def evict(self):
        """Idle pages leave, the longest idle first, until all that is in use fits beside them."""
        page_blocks = PAGE // self.profile.block_tokens
        used = {page for each in self.running for page in each.pages}
        idle = sorted((page for page in self.cache if page not in used), key=lambda page: self.cache[page])
        while len(idle) * page_blocks > self.free():
            del self.cache[idle.pop(0)]

    def land(self, number, arrival, now):
        self.landed += 1
        self.waiting.append(Held(number, arrival, self.landed))
        if self.due == inf:
            self.begin(now)

    def release(self, each):
        self.running.remove(each)
        for page in reversed(each.pages):
            if all(page not in other.pages for other in self.running):
                self.let_go += 1
                self.cache[page] = self.let_go
        each.pages, each.own_blocks = [], 0

    def preempt(self):
        newest = max(self.running, key=lambda each: each.order)
        self.release(newest)
        newest.context, newest.decoding = 0, False
        newest.target = newest.prompt + newest.generated
        newest.preemptions += 1
        self.waiting.insert(0, newest)

    def begin(self, now):
        profile, preempted = self.profile, False
        while True:
            decodes = [each for each in self.running if each.decoding]
            needy = [each for each in decodes if each.context % profile.block_tokens == 0]
            if len(needy) <= self.free():
                break
            self.preempt()
            preempted = True
        for each in needy:
            each.own_blocks += 1
        self.evict()
        budget = profile.step_tokens_max - len(decodes)
        self.chunks = []
        for each in self.running:
            if not each.decoding and budget:
                self.chunks.append((each, min(budget, each.target - each.context)))
                budget -= self.chunks[-1][1]
        while budget and self.waiting and len(self.running) < profile.sequences_max and not preempted:
            each = self.waiting[0]
            if not self.admit(each):
                break
            self.chunks.append((each, min(budget, each.target - each.context)))
            budget -= self.chunks[-1][1]
        tokens = len(decodes) + sum(count for _, count in self.chunks)
        if not tokens:
            self.due = inf
            return
        for each in decodes:
            each.context += 1
        read = sum(each.context for each in decodes)
        pairs = sum(count * (each.context + count / 2) for each, count in self.chunks)
        self.due = now + profile.step_s(tokens, read, pairs, len(decodes) + len(self.chunks))

    def admit(self, each):
        page_blocks = PAGE // self.profile.block_tokens
        pages = []
        for page in each.prefix[: (each.target - 1) // PAGE]:
            if page not in self.cache:
                break
            pages.append(page)
        used = {page for other in self.running for page in other.pages}
        idle = sum(page not in used for page in pages) * page_blocks
        own = self.blocks(each.target) - len(pages) * page_blocks
        spare = len(self.running) if each.preemptions else min(1, len(self.running))
        if own + spare > self.free() - idle:
            return False
        self.waiting.pop(0)
        each.pages, each.own_blocks, each.context = pages, own, len(pages) * PAGE
        if each.cached is None:
            each.cached = each.context
        self.running.append(each)
        self.running.sort(key=lambda other: other.order)
        self.evict()
        return True

    def step_ended(self):
        now, page_blocks = self.due, PAGE // self.profile.block_tokens
        chunked = {id(each) for each, _ in self.chunks}
        drawing = [each for each in self.running if each.decoding and id(each) not in chunked]
        for each, count in self.chunks:
            each.context += count
            whole = min(each.context // PAGE, len(each.prefix))
            for page in each.prefix[len(each.pages) : whole]:
                each.pages.append(page)
                each.own_blocks -= page_blocks
                self.cache[page] = inf
            if each.context == each.target:
                each.decoding = True
                drawing.append(each)
        # Prompts before decodes, as both end with the step: it decides who lets pages go first.
        drawing.sort(key=lambda each: (id(each) not in chunked, each.order))
        for each in drawing:
            each.generated += 1
            self.first.setdefault(each.number, now)
            if each.generated == each.output:
                self.release(each)
                self.ended[each.number] = (now, each.cached, each.preemptions)
        self.begin(now)


def drive(worker, arrivals, land):
    """Let requests land at their times; steps end between them. `land(worker, number, arrival)`."""
    pending = list(enumerate(arrivals))
    while pending or worker.due < inf:
        if pending and pending[0][1].at <= worker.due:
            number, arrival = pending.pop(0)
            land(worker, number, arrival)
        else:
            yield worker.due, worker.step_ended()
