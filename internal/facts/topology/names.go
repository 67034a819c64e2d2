package topology

import (
	"fmt"
	"regexp"
	"strings"
)

const (
	maxShortLabel  = 20
	wantShortLabel = "not a name; want lower-case letters, digits and '-', beginning with a letter, at most 20 characters"
)

var (
	shortLabel    = regexp.MustCompile(`^[a-z]([-a-z0-9]*[a-z0-9])?$`)
	dnsLabel      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	qualifiedName = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
)

// isShortLabel says whether s can name a lab or a cluster. Such a name becomes part of host names, of
// directories and of network namespaces, so it is shorter and begins with a letter.
func isShortLabel(s string) bool { return len(s) <= maxShortLabel && shortLabel.MatchString(s) }

// IsName says whether s can name a lab. No other name is a part of a path.
func IsName(s string) bool { return isShortLabel(s) }

// isDNSName says whether s is a DNS-1123 subdomain.
func isDNSName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 || !dnsLabel.MatchString(label) {
			return false
		}
	}
	return true
}

// isLabelKey says whether s can be the key of a Kubernetes label or taint.
func isLabelKey(s string) bool {
	prefix, name, hasPrefix := strings.Cut(s, "/")
	if !hasPrefix {
		name = prefix
	} else if !isDNSName(prefix) {
		return false
	}
	return len(name) <= 63 && qualifiedName.MatchString(name)
}

// isLabelValue says whether s can be the value of a Kubernetes label or taint.
func isLabelValue(s string) bool {
	return s == "" || len(s) <= 63 && qualifiedName.MatchString(s)
}

// shortNodeName returns a node's name without its cluster: control-plane, control-plane2, worker1.
func shortNodeName(role Role, ordinal int) string {
	switch {
	case role == Worker:
		return fmt.Sprintf("worker%d", ordinal)
	case ordinal == 1:
		return "control-plane"
	default:
		return fmt.Sprintf("control-plane%d", ordinal)
	}
}

// nearest returns the candidate that s is most likely a slip of the pen for, or "".
func nearest(s string, candidates []string) string {
	best, bestDistance := "", 3
	for _, c := range candidates {
		if strings.EqualFold(s, c) {
			return c
		}
		if d := distance(strings.ToLower(s), strings.ToLower(c)); d < bestDistance && d < len(c)/2+1 {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete or replace between a and b. It gives up early on
// long input, which can be no slip of the pen.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// didYouMean returns the candidates in words, the likely one first.
func didYouMean(s string, candidates []string) string {
	if n := nearest(s, candidates); n != "" {
		return fmt.Sprintf("did you mean %s?", n)
	}
	return "want " + oneOf(candidates)
}

// oneOf writes "a, b or c".
func oneOf(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}
