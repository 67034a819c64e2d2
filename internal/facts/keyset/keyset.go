// Package keyset is the keys by which the agents of a cluster know each other, as the Secret fathom-membership holds them,
// and how one key gives way to another without an agent that does not understand the others meanwhile.
package keyset

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
)

// What is in the Secret, in the namespace fathom-system.
const (
	Secret = "fathom-membership"
	// Key is the key that agents encrypt with. It is the only one outside of a rotation.
	Key = "key"
	// Next is a key that agents already understand, and that is to become the key.
	Next = "next"
	// Previous is the key of before, which agents still understand.
	Previous = "previous"
	// Size is that of each key, in bytes: AES-256.
	Size = 32
)

// Read returns the keys of a Secret: first the one to encrypt with, then others to understand.
func Read(data map[string][]byte) ([][]byte, error) {
	var keys [][]byte
	for _, name := range []string{Key, Next, Previous} {
		key, found := data[name]
		if name != Key && !found {
			continue
		}
		if len(key) != Size {
			return nil, fmt.Errorf("%s in Secret %s has %d bytes, want %d: delete the Secret, and the controller makes another", name, Secret, len(key), Size)
		}
		if !slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) }) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// ID names a key without telling anything of it: keys are random, so that nobody can guess one and compare.
func ID(key []byte) string {
	sum := sha256.Sum256(append([]byte("fathom membership key\x00"), key...))
	return hex.EncodeToString(sum[:6])
}

// IDs names keys.
func IDs(keys [][]byte) []string {
	var ids []string
	for _, k := range keys {
		ids = append(ids, ID(k))
	}
	return ids
}

// Step is what a rotation does next.
type Step struct {
	// Accept is the key that all agents have to understand before, and Use the one that all have to encrypt with; empty if it
	// does not matter.
	Accept, Use string
	// Data is what the Secret is to hold then.
	Data map[string][]byte
	// Last says that the rotation is over with it.
	Last bool
}

// Rotate says what the next step is from what a Secret holds. fresh is the key that is to come, if a rotation begins.
// Between neighbouring steps any two agents understand each other:
//
//	key=A             A
//	key=A next=B      encrypts with A, understands B
//	key=B previous=A  encrypts with B, understands A
//	key=B             B
func Rotate(data map[string][]byte, fresh []byte) (Step, error) {
	if _, err := Read(data); err != nil {
		return Step{}, err
	}
	s := Step{Data: maps.Clone(data)}
	next, hasNext := data[Next]
	_, hasPrevious := data[Previous]
	switch {
	case hasNext:
		s.Accept = ID(next)
		s.Data[Key], s.Data[Previous] = next, data[Key]
		delete(s.Data, Next)
	case hasPrevious:
		s.Use = ID(data[Key])
		delete(s.Data, Previous)
		s.Last = true
	case len(fresh) != Size:
		return Step{}, fmt.Errorf("a key has %d bytes, want %d", len(fresh), Size)
	default:
		s.Data[Next] = fresh
	}
	return s, nil
}

// Allows says whether an agent that has these keys, by their names and the one that it encrypts with first, permits the step.
// One without keys is no member, and will read those that there are when it becomes one.
func (s Step) Allows(ids []string) bool {
	switch {
	case len(ids) == 0:
		return true
	case s.Accept != "" && !slices.Contains(ids, s.Accept):
		return false
	case s.Use != "" && ids[0] != s.Use:
		return false
	}
	return true
}
